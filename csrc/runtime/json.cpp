#include "json.h"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <utility>

#include <fga_fast/error.h>

namespace fga {
namespace {

constexpr int kMaxLevels = 64;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (at_ != text_.size()) fail("nothing more");
    return json;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    throw Error("JSON: expected " + expected + " at byte " + std::to_string(at_));
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  void take(char c) {
    skip_space();
    if (peek() != c) fail(std::string("'") + c + "'");
    ++at_;
  }
  bool take_if(char c) {
    skip_space();
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  Json value(int level) {
    if (level > kMaxLevels) fail("at most " + std::to_string(kMaxLevels) + " levels");
    skip_space();
    switch (peek()) {
      case '{': return object(level);
      case '[': return array(level);
      case '"': return {string()};
      case 't': return word("true", {true});
      case 'f': return word("false", {false});
      case 'n': return word("null", {nullptr});
      default: return {number()};
    }
  }

  Json word(std::string_view text, Json meaning) {
    if (text_.substr(at_, text.size()) != text) fail("a value");
    at_ += text.size();
    return meaning;
  }

  Json object(int level) {
    Json::Object members;
    take('{');
    if (take_if('}')) return {std::move(members)};
    do {
      skip_space();
      if (peek() != '"') fail("a name in quotes");
      std::string name = string();
      take(':');
      if (!members.emplace(name, value(level + 1)).second) fail("every name once, not '" + name + "' again,");
    } while (take_if(','));
    take('}');
    return {std::move(members)};
  }

  Json array(int level) {
    Json::Array elements;
    take('[');
    if (take_if(']')) return {std::move(elements)};
    do elements.push_back(value(level + 1));
    while (take_if(','));
    take(']');
    return {std::move(elements)};
  }

  double number() {
    const size_t start = at_;
    if (peek() == '-') ++at_;
    if (peek() == '0')
      ++at_;
    else
      digits();
    if (peek() == '.') ++at_, digits();
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    double number = 0;
    const auto [end, error] = std::from_chars(text_.data() + start, text_.data() + at_, number);
    if (error != std::errc() || end != text_.data() + at_ || !std::isfinite(number))
      fail("a number that fits a double");
    return number;
  }

  void digits() {
    const size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    if (at_ == start) fail("a value");
  }

  std::string string() {
    std::string out;
    for (++at_; peek() != '"'; ++at_) {
      if (at_ >= text_.size() || static_cast<unsigned char>(peek()) < 0x20) fail("'\"'");
      if (peek() == '\\')
        escape(out);
      else
        out += peek();
    }
    ++at_;
    return out;
  }

  void escape(std::string& out) {  // leaves at_ on the last character of the escape
    ++at_;
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t which = at_ < text_.size() ? kNames.find(peek()) : std::string_view::npos;
    if (which != std::string_view::npos) {
      out += kMeanings[which];
      return;
    }
    if (peek() != 'u') fail("an escape");
    uint32_t code = four_digits();
    if (code >= 0xd800 && code < 0xdc00) {
      if (text_.substr(at_ + 1, 2) != "\\u") fail("the second half of a pair");
      at_ += 2;
      const uint32_t low = four_digits();
      if (low < 0xdc00 || low > 0xdfff) fail("the second half of a pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000) {
      fail("the first half of a pair");
    }
    append_utf8(out, code);
  }

  uint32_t four_digits() {  // after the u; leaves at_ on the last digit
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      ++at_;
      const char c = peek();
      const size_t digit = std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
      if (at_ >= text_.size() || digit == std::string_view::npos) fail("four hexadecimal digits");
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append_utf8(std::string& out, uint32_t code) {
    const auto add = [&out](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) return add(code);
    if (code < 0x800) {
      add(0xc0 | code >> 6);
    } else {
      if (code < 0x10000) {
        add(0xe0 | code >> 12);
      } else {
        add(0xf0 | code >> 18);
        add(0x80 | (code >> 12 & 0x3f));
      }
      add(0x80 | (code >> 6 & 0x3f));
    }
    add(0x80 | (code & 0x3f));
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

Json parse_json(std::string_view text) {
  return Parser(text).document();
}

}  // namespace fga

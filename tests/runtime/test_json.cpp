#include <doctest/doctest.h>

#include <fga_fast/error.h>

#include "json.h"

using fga::parse_json;

namespace {
std::string text_of(const std::string& json) {
  return *parse_json(json).as<std::string>();
}
double number_of(const std::string& json) {
  return *parse_json(json).as<double>();
}
}  // namespace

TEST_CASE("values of JSON are read") {
  CHECK(parse_json(" null ").is_null());
  CHECK(*parse_json("true").as<bool>());
  CHECK_FALSE(*parse_json("false").as<bool>());
  CHECK(number_of("-0.5e2") == -50);
  CHECK(number_of("0") == 0);
  CHECK(number_of("1E+2") == 100);
  CHECK(number_of("9007199254740991") == 9007199254740991.0);
  const fga::Json json = parse_json("{\"a\": [1, {\"b\": []}], \"\": {}}");
  const auto& members = *json.as<fga::Json::Object>();
  CHECK(members.size() == 2);
  CHECK(members.at("").as<fga::Json::Object>()->empty());
  CHECK(members.at("a").as<fga::Json::Array>()->size() == 2);
}

TEST_CASE("escapes in strings of JSON are read") {
  CHECK(text_of("\"a\\n\\t\\\"\\\\\\/\"") == "a\n\t\"\\/");
  CHECK(text_of("\"\\u00e9\\u20ac\\uD83d\\ude00\"") == "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  CHECK(text_of("\"\xc3\xa9\"") == "\xc3\xa9");
  CHECK(text_of("\"\\u0000\"") == std::string(1, '\0'));
}

TEST_CASE("what is not JSON is refused") {
  for (const char* text : {"",
                           "  ",
                           "nul",
                           "NaN",
                           "Infinity",
                           "-",
                           "01",
                           "1.",
                           ".5",
                           "1e",
                           "+1",
                           "1e999",
                           "[1,]",
                           "[1 2]",
                           "{\"a\":1,}",
                           "{a:1}",
                           "{\"a\" 1}",
                           "[",
                           "{",
                           "{\"a\":1",
                           "\"",
                           "\"\\x\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\ud800\\",
                           "\"a\nb\"",
                           "1 2",
                           "// comment\n1",
                           "{\"a\":1,\"a\":2}",
                           "\xef\xbb\xbf"
                           "1"}) {
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(parse_json(text), doctest::Contains("JSON: expected"), fga::Error);
  }
  CHECK_THROWS_WITH_AS(parse_json(std::string(100000, '[')), doctest::Contains("at most 64 levels"), fga::Error);
  CHECK_THROWS_WITH_AS(parse_json("[1, }"), doctest::Contains("a value at byte 4"), fga::Error);
}

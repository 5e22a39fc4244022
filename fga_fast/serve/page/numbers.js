/** The arithmetic of the page, without a document: gates, heat maps, probabilities and how numbers are written. */

const MAD_TO_STD = 1.4826;
const TINY = 1e-8;
const ROUNDING = 8 * 2 ** -23;

/** Factors of the patches, as fga_fast/reference/gate.py: base ** tanh(slope * z), z from the scores [P]. */
export function gatesOf(scores, base, slope) {
  const median = lowerMedian(scores);
  const deviations = scores.map((score) => score - median);
  const spread = MAD_TO_STD * (lowerMedian(deviations.map(Math.abs)) + TINY);
  return deviations.map((deviation) => base ** Math.tanh((slope * deviation) / spread));
}

function lowerMedian(values) {
  return [...values].sort((a, b) => a - b)[(values.length - 1) >> 1];
}

/** Values [P] of a grid at every pixel, scaled to [0,1]; `centred` gives 0 the value 0.5.
 *
 * As `to_picture` of fga_fast/result/heatmap.py: bilinear between the patches' centres, each map on its own scale; what
 * differs by rounding only is the same everywhere.
 */
export function heatmap(values, [rows, columns], [height, width], centred) {
  const [down, across] = [between(rows, height), between(columns, width)];
  const found = new Float32Array(height * width);
  const line = new Float64Array(columns); // the patches' values at the height of a row of pixels
  let [low, high] = [Infinity, -Infinity];
  for (let y = 0; y < height; y++) {
    for (let column = 0; column < columns; column++) {
      const above = values[down.first[y] * columns + column];
      line[column] = above + (values[down.second[y] * columns + column] - above) * down.share[y];
    }
    for (let x = 0; x < width; x++) {
      const left = line[across.first[x]];
      const value = left + (line[across.second[x]] - left) * across.share[x];
      found[y * width + x] = value;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  const largest = Math.max(-low, high);
  if (centred) [low, high] = [-largest, largest];
  const extent = high - low;
  if (!(extent > ROUNDING * largest)) return found.fill(centred ? 0.5 : 0);
  for (let pixel = 0; pixel < found.length; pixel++) found[pixel] = (found[pixel] - low) / extent;
  return found;
}

/** For each of `size` pixels the patches on either side of it, and its share of the way from the first to the second. */
function between(patches, size) {
  const [first, second, share] = [new Int32Array(size), new Int32Array(size), new Float64Array(size)];
  for (let pixel = 0; pixel < size; pixel++) {
    const place = Math.max(((pixel + 0.5) * patches) / size - 0.5, 0);
    first[pixel] = Math.min(Math.floor(place), patches - 1);
    second[pixel] = Math.min(first[pixel] + 1, patches - 1);
    share[pixel] = place - first[pixel];
  }
  return { first, second, share };
}

/** Probabilities of logits, or null if the model's outputs are none. */
export function probabilities(logits, kind) {
  if (kind === "sigmoid") return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  if (kind !== "softmax") return null;
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Index of the largest value. */
export function strongest(values) {
  return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

const DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, useGrouping: false });

/** Three digits; a true minus sign; a power of ten where the number is very small or large. */
export function short(value) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : DIGITS.format(value);
  return text.replaceAll("-", "−");
}

export function milliseconds(value) {
  return value < 10 ? value.toFixed(1) : value.toFixed(0);
}

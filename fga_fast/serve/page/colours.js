/** Colour maps as short tables, interpolated linearly.
 *
 * The same tables as in fga_fast/result/colours.py, whose sources are named there; tests compare them. "diverging" is
 * the RdBu scheme of ColorBrewer (C. Brewer, Apache-2.0), from blue to red.
 */

const TABLES = {
  turbo:
    "30123b 3f3e9c 4666dd 458cfd 2fb2f4 1ad4d0 22ebaa 52fa7a 8bff4b " +
    "b7f735 dbe236 f5c53a fea130 f9751d e84b0c ce2d04 a91601 7a0403",
  viridis:
    "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e " +
    "1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725",
  magma:
    "000004 090720 1a1042 311165 4a1079 621980 792282 912b81 aa337d " +
    "c23b75 d9466b ec5860 f7725c fc8e64 feaa74 fec68a fde2a3 fcfdbf",
  gray: "000000 ffffff",
  diverging: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
};

/** For maps without a sign, and for signed ones; the first is the one to start with. */
export const NAMES = ["turbo", "viridis", "magma", "gray"];
export const SIGNED_NAMES = ["diverging", ...NAMES];

const STEPS = 256;
const tables = new Map();

/** 256 colours, three bytes each, from the low end to the high one. */
export function colourTable(name) {
  if (!tables.has(name)) tables.set(name, interpolated(TABLES[name].split(" ")));
  return tables.get(name);
}

function interpolated(entries) {
  const rows = entries.map((entry) => [0, 2, 4].map((at) => parseInt(entry.slice(at, at + 2), 16)));
  const found = new Uint8ClampedArray(STEPS * 3);
  for (let step = 0; step < STEPS; step++) {
    const place = (step / (STEPS - 1)) * (rows.length - 1);
    const below = Math.min(Math.floor(place), rows.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const [low, high] = [rows[below][channel], rows[below + 1][channel]];
      found[step * 3 + channel] = Math.round(low + (high - low) * (place - below));
    }
  }
  return found;
}

/** Where the colour of a value in [0,1] starts in a table. */
export function placeOf(value) {
  return Math.round(Math.min(Math.max(value, 0), 1) * (STEPS - 1)) * 3;
}

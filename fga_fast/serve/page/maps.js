/** Draws pictures with maps, panels of gates, their scales, and the mark of the chosen patch. */

import { colourTable, placeOf } from "./colours.js";

export const [STILL, MOVING] = [480, 256]; // pixels of a map's longer side; those of a webcam must be drawn fast

/** A canvas with the part of a picture that the model sees; `view` is [left, top, right, bottom] in shares of it. */
export function seenPart(source, view, [height, width], longSide) {
  const scale = longSide / Math.max(height, width);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  const [left, top, right, bottom] = view;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const box = [left * source.width, top * source.height, (right - left) * source.width, (bottom - top) * source.height];
  context.drawImage(source, ...box, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** The pixels of a canvas. */
export function pixelsOf(canvas) {
  return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
}

/** Draws heat [H * W] over the pixels of a picture.
 *
 * The picture loses its own colours as the map becomes opaque, since nobody could tell them from those of the map.
 * Diverging colours let it through where relevance is 0.
 */
export function drawMap(canvas, heat, { data, width, height }, colours, opacity) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const table = colourTable(colours);
  const colour = Math.max(1 - 2 * opacity, 0);
  const drawn = image.data;
  for (let pixel = 0, at = 0; pixel < heat.length; pixel++, at += 4) {
    const from = placeOf(heat[pixel]);
    const weight = colours === "diverging" ? opacity * Math.min(Math.abs(4 * heat[pixel] - 2), 1) : opacity;
    const grey = (1 - colour) * (0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]);
    drawn[at] = (1 - weight) * (grey + colour * data[at]) + weight * table[from];
    drawn[at + 1] = (1 - weight) * (grey + colour * data[at + 1]) + weight * table[from + 1];
    drawn[at + 2] = (1 - weight) * (grey + colour * data[at + 2]) + weight * table[from + 2];
    drawn[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** One pixel a patch, which CSS enlarges without smoothing: blue where a gate is below 1, red above. */
export function drawGates(canvas, gates, [rows, columns], limit) {
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const table = colourTable("diverging");
  gates.forEach((gate, patch) => {
    const from = placeOf((Math.log(gate) / limit + 1) / 2);
    image.data.set([...table.slice(from, from + 3), 255], patch * 4);
  });
  context.putImageData(image, 0, 0);
}

/** A colour bar with words below it. */
export function drawScale(element, colours, words) {
  const canvas = element.querySelector("canvas");
  const table = colourTable(colours);
  [canvas.width, canvas.height] = [table.length / 3, 1];
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, 1);
  for (let step = 0; step < canvas.width; step++) image.data.set([...table.slice(step * 3, step * 3 + 3), 255], step * 4);
  context.putImageData(image, 0, 0);
  const spans = words.map((word) => Object.assign(document.createElement("span"), { textContent: word }));
  element.querySelector("p").replaceChildren(...spans);
}

/** A panel with a canvas and its mark. */
export function newPanel() {
  const panel = document.createElement("div");
  panel.className = "panel";
  panel.setAttribute("role", "img");
  const mark = document.createElement("div");
  mark.className = "mark";
  mark.hidden = true;
  panel.append(document.createElement("canvas"), mark);
  return panel;
}

/** Puts the mark of a panel around a patch, or takes it away. */
export function markPatch(panel, patch, [rows, columns]) {
  const mark = panel.querySelector(".mark");
  mark.hidden = patch === null;
  if (patch === null) return;
  mark.style.left = `${((patch % columns) / columns) * 100}%`;
  mark.style.top = `${(Math.floor(patch / columns) / rows) * 100}%`;
  mark.style.width = `${100 / columns}%`;
  mark.style.height = `${100 / rows}%`;
}

/** The patch under the pointer. */
export function patchAt(panel, event, [rows, columns]) {
  const box = panel.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  return Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1);
}

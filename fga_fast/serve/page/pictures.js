/** Where pictures come from: files, drops, the clipboard, samples. */

import { KINDS, Problem, readSample } from "./server.js";

/** Calls `opened(blob, name)` for each picture that somebody brings, and `failed(problem)` where there is none in it. */
export function listenForPictures(page, opened, failed) {
  const drop = page.querySelector("#drop");
  const file = page.querySelector("#file");
  const take = (transfer, otherwise) => {
    const found = [...(transfer?.files ?? [])];
    const picture = found.find((one) => one.type.startsWith("image/")) ?? found[0];
    if (picture) opened(picture, picture.name);
    else if (otherwise) failed(new Problem(otherwise));
  };
  file.addEventListener("change", () => {
    take(file);
    file.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (!event.target.closest?.("input, textarea")) take(event.clipboardData, "There is no picture on the clipboard.");
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer, "Only files can be dropped here. Save the picture first, then drop its file.");
  });
}

/** Offers the server's samples as buttons. */
export function offerSamples(section, names, opened, failed) {
  section.hidden = names.length === 0;
  const read = new Map(names.map((name) => [name, readSample(name)]));
  section.querySelector("ul").replaceChildren(...names.map((name) => {
    const [item, button, image] = ["li", "button", "img"].map((tag) => document.createElement(tag));
    const title = name.replace(/\.\w+$/, "").replaceAll("_", " ");
    Object.assign(button, { type: "button", title });
    image.alt = title;
    read.get(name).then((blob) => (image.src = URL.createObjectURL(blob)), failed);
    button.append(image);
    item.append(button);
    button.addEventListener("click", () => read.get(name).then((blob) => opened(blob, name), failed));
    return item;
  }));
}

/** A picture as the server can read it, and decoded: { blob, bitmap }.
 *
 * Other formats that the browser knows become PNG. Throws a Problem if nobody can read it.
 */
export async function readable(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Problem("This file is no picture that the browser can read. JPEG, PNG and WebP work everywhere.");
  }
  if (KINDS.has(blob.type)) return { blob, bitmap };
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return { blob: await new Promise((resolve) => canvas.toBlob(resolve, "image/png")), bitmap };
}

/** Offers a file for download. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** The chosen patch: by pointer or by keys, marked in every panel, and told in numbers. */

import { short, strongest } from "./numbers.js";
import { markPatch, patchAt } from "./maps.js";

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class Patches {
  /** `facts(patch)` gives what is known of a patch: rows of [name, text]. */
  constructor(page, map, facts) {
    this.page = page;
    this.map = map;
    this.facts = facts;
    this.patch = null;
    this.told = page.querySelector("#patch-facts");
    this.said = page.querySelector("#patch-said");
    for (const kind of ["pointermove", "pointerdown"]) page.addEventListener(kind, (event) => this._point(event));
    map.addEventListener("keydown", (event) => this._key(event));
    map.addEventListener("focus", () => this.grid && this.patch === null && this.choose(strongest(this.values)));
  }

  /** Begins anew with an answer's map [P]; a patch that was chosen stays so. */
  show(values, grid) {
    if (String(grid) !== String(this.grid)) this.patch = null;
    Object.assign(this, { values, grid });
    this.tell();
  }

  choose(patch, speak = false) {
    this.patch = patch;
    this.tell();
    if (!speak) return;
    const facts = this.facts(patch).map(([name, text]) => `${name} ${text}`);
    this.said.textContent = `${this.place(patch)}. ${facts.join(". ")}`;
  }

  place(patch) {
    return `Row ${Math.floor(patch / this.grid[1]) + 1}, column ${(patch % this.grid[1]) + 1}`;
  }

  /** Marks the patch and writes down what is known of it. */
  tell() {
    for (const panel of this.page.querySelectorAll(".panel")) markPatch(panel, this.patch, this.grid);
    this.page.querySelector("#patch h3").textContent = this.patch === null ? "No patch chosen" : this.place(this.patch);
    const rows = this.patch === null ? [] : this.facts(this.patch);
    const list = document.createElement("dl");
    for (const [name, text, address] of rows) {
      const [row, term, fact] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      if (address) term.append(Object.assign(document.createElement("a"), { href: address, textContent: name }));
      else term.textContent = name;
      fact.textContent = text;
      row.append(term, fact);
      list.append(row);
    }
    this.told.replaceChildren(list);
  }

  _point(event) {
    const panel = event.target.closest?.(".panel");
    if (!panel || !this.grid) return;
    const patch = patchAt(panel, event, this.grid);
    if (patch !== this.patch) this.choose(patch);
  }

  _key(event) {
    if (!this.grid || event.ctrlKey || event.altKey || event.metaKey) return;
    const [rows, columns] = this.grid;
    const at = this.patch ?? strongest(this.values);
    const [row, column] = [Math.floor(at / columns), at % columns];
    if (event.key === "Home") this.choose(row * columns, true);
    else if (event.key === "End") this.choose((row + 1) * columns - 1, true);
    else if (event.key in STEPS) {
      const [down, across] = STEPS[event.key];
      const [y, x] = [Math.min(Math.max(row + down, 0), rows - 1), Math.min(Math.max(column + across, 0), columns - 1)];
      this.choose(y * columns + x, true);
    } else return;
    event.preventDefault();
  }
}

/** The list of classes with their probabilities, and the two things one can ask of each. */

import { percent, probabilities, short } from "./numbers.js";

const FEW = 10;
const MANY = 60; // that a search shows at once

export class ClassList {
  /** `ask(target, ratherThan)` is called when somebody chooses a class, or a class to compare with. */
  constructor(section, ask) {
    this.section = section;
    this.list = section.querySelector("ol");
    this.search = section.querySelector("#search");
    this.shown = section.querySelector("#classes-shown");
    this.ask = ask;
    this.rows = new Map(); // class -> its row, kept so that focus stays where it is
    this.search.addEventListener("input", () => this._draw());
    this.list.addEventListener("click", (event) => this._click(event));
  }

  /** Shows the logits of an answer; `names` are those of the logits' columns; `compares`: whether it can compare. */
  show(answer, names, compares) {
    if (names.length !== this.names?.length) this.rows.clear();
    Object.assign(this, { answer, names, compares });
    this.target = answer.targets[0];
    this.ratherThan = answer.rather_than ?? null;
    this.shares = probabilities(answer.logits, answer.probability_is);
    this.order = answer.logits.map((_, index) => index).sort((a, b) => answer.logits[b] - answer.logits[a]);
    this.section.hidden = false;
    this._draw();
  }

  /** How likely a class is, in words; the plain output where the model's outputs are no probabilities. */
  likely(index) {
    return this.shares ? percent(this.shares[index]) : short(this.answer.logits[index]);
  }

  _draw() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (index) => words.every((word) => `${this.names[index]} ${index}`.toLowerCase().includes(word));
    const found = words.length ? this.order.filter(fits) : this.order;
    const few = found.slice(0, words.length ? MANY : FEW);
    // What is being explained stays in sight, however unlikely it is.
    const asked = [this.target, this.ratherThan].filter((index) => found.includes(index) && !few.includes(index));
    const rows = [...few, ...asked].map((index) => this._row(index));
    if (rows.length !== this.list.children.length || rows.some((row, place) => row !== this.list.children[place])) {
      const focus = this.list.contains(document.activeElement) ? document.activeElement : null;
      this.list.replaceChildren(...rows);
      focus?.focus({ preventScroll: true }); // moving a row takes the focus from it
    }
    const all = this.order.length;
    const text = found.length ? `${rows.length} of ${words.length ? `${found.length} found` : all} shown` : "None found";
    if (this.shown.textContent !== text) this.shown.textContent = text;
  }

  _row(index) {
    if (!this.rows.has(index)) this.rows.set(index, newRow(index));
    const row = this.rows.get(index);
    const [explain, compare] = row.querySelectorAll("button");
    const share = this.shares?.[index] ?? null;
    const isTarget = index === this.target;
    explain.querySelector(".name").textContent = this.names[index];
    explain.querySelector(".likely").textContent = this.likely(index);
    explain.querySelector(".bar").style.width = `${100 * (share ?? 0)}%`;
    explain.setAttribute("aria-pressed", String(isTarget));
    compare.hidden = isTarget || !this.compares;
    compare.setAttribute("aria-pressed", String(index === this.ratherThan));
    compare.setAttribute("aria-label", `Not this? Why ${this.names[this.target]} and not ${this.names[index]}?`);
    return row;
  }

  _click(event) {
    const button = event.target.closest("button");
    if (!button) return;
    const index = Number(button.closest("li").value);
    const compares = button.classList.contains("compare") || (event.shiftKey && this.compares);
    if (compares && index !== this.target) {
      this.ask(this.target, index === this.ratherThan ? null : index);
    } else if (!compares) this.ask(index, null);
  }
}

function newRow(index) {
  const row = document.createElement("li");
  row.value = index;
  row.innerHTML = `
    <button type="button" class="explain"><span class="bar"></span><span class="name"></span>
      <span class="likely"></span></button>
    <button type="button" class="compare">Not this?</button>`;
  return row;
}

/** The panels of gates, with sliders that compute them again from the scores. */

import { gatesOf, short } from "./numbers.js";
import { drawGates, drawScale, newPanel } from "./maps.js";

const SMALLEST = 0.05; // of the scale's ends: below, there would be colours without a difference

export class Gates {
  /** `changed()` is called after a slider moved. */
  constructor(section, changed) {
    this.section = section;
    this.base = section.querySelector("#base"); // its value is the base's logarithm to base 10
    this.slope = section.querySelector("#slope");
    this.panels = new Map(); // block -> figure
    this.shown = {}; // block -> gates [P] of the first target, as the panels show them
    const redraw = () => {
      this._draw();
      changed();
    };
    for (const slider of [this.base, this.slope]) slider.addEventListener("input", redraw);
    section.querySelector("#served").addEventListener("click", () => {
      this._reset();
      redraw();
    });
  }

  /** Shows the gates of an answer; sliders that were moved stay where they are. */
  show(answer) {
    this.section.hidden = Object.keys(answer.gates).length === 0;
    this.shown = {};
    if (this.section.hidden) return;
    const { base = null, slope = null } = answer.gate ?? {};
    const isNew = base !== this.served?.base || slope !== this.served?.slope;
    Object.assign(this, { answer, served: { base, slope } });
    this.section.querySelector(".sliders").hidden = base === null;
    if (isNew && base !== null) this._reset();
    this._draw();
  }

  /** Whether the sliders are where the server's settings are. */
  get asServed() {
    return this.served.base === null || [this.base.value, this.slope.value].join() === this.places;
  }

  _reset() {
    const { base, slope } = this.served;
    setRange(this.base, 0, 1.6, Math.log10(base));
    setRange(this.slope, 0, 4, slope);
    this.places = [this.base.value, this.slope.value].join();
  }

  _draw() {
    const { scores, gates, grid } = this.answer;
    const asServed = this.asServed;
    const base = asServed ? this.served.base : 10 ** Number(this.base.value);
    const slope = asServed ? this.served.slope : Number(this.slope.value);
    const blocks = Object.keys(gates);
    const gatesOfBlock = (block) => (asServed ? gates[block][0] : gatesOf(scores[block][0], base, slope));
    this.shown = Object.fromEntries(blocks.map((block) => [block, gatesOfBlock(block)]));
    this._tell(base, slope, asServed);
    const end = base === null ? largest(Object.values(this.shown)) : largest([[base, this.served.base]]);
    const limit = Math.max(Math.log(end), SMALLEST);
    if (blocks.join() !== [...this.panels.keys()].join()) this._make(blocks);
    for (const [block, figure] of this.panels) showBlock(figure, block, this.shown[block], grid, limit);
    const words = [-limit, 0, limit].map((power) => `× ${short(Math.exp(power))}`);
    drawScale(this.section.querySelector("#gate-scale"), "diverging", words);
  }

  _tell(base, slope, asServed) {
    if (base === null) return;
    for (const [slider, value] of [[this.base, base], [this.slope, slope]]) {
      this.section.querySelector(`#${slider.id}-value`).textContent = short(value);
      slider.setAttribute("aria-valuetext", short(value));
    }
    this.section.querySelector("#served").setAttribute("aria-pressed", String(asServed));
  }

  _make(blocks) {
    this.panels = new Map(blocks.map((block) => [block, newFigure(block)]));
    this.section.querySelector(".panels").replaceChildren(...this.panels.values());
  }
}

function newFigure(block) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const counts = document.createElement("span");
  counts.className = "counts";
  caption.append(`Block ${block}`, counts);
  figure.append(newPanel(), caption);
  return figure;
}

function setRange(slider, least, most, value) {
  slider.min = Math.min(least, value);
  slider.max = Math.max(most, value);
  slider.value = value;
}

function largest(panels) {
  return panels.flat().reduce((found, gate) => Math.max(found, gate, 1 / gate), 1);
}

function showBlock(figure, block, gates, grid, limit) {
  drawGates(figure.querySelector("canvas"), gates, grid, limit);
  const [up, down] = [gates.filter((gate) => gate > 1.005), gates.filter((gate) => gate < 0.995)];
  const counts = `${up.length} of ${gates.length} patches raised, ${down.length} lowered`;
  figure.querySelector(".counts").textContent = counts;
  figure.querySelector(".panel").setAttribute("aria-label", `Gates of block ${block}: ${counts}`);
}

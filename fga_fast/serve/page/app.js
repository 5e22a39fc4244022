/** The page: what is asked, and which part shows what of the answer. */

import { Camera } from "./camera.js";
import { ClassList } from "./classes.js";
import { NAMES, SIGNED_NAMES } from "./colours.js";
import { Gates } from "./gates.js";
import { MOVING, STILL, drawMap, drawScale, pixelsOf, seenPart } from "./maps.js";
import { heatmap, milliseconds, percent, short, strongest } from "./numbers.js";
import { Patches } from "./patches.js";
import { listenForPictures, offerSamples, readable, save } from "./pictures.js";
import { Problem, explain, readModel, setToken } from "./server.js";

const RETRY = 2000; // ms, while the server starts
const COLOURS = { diverging: "blue to red" };
const CALM = 250; // ms between changes of texts while the webcam runs

const find = (selector) => document.querySelector(selector);
const state = {
  model: null,
  picture: null, // { blob, bitmap, name }, or null with the webcam
  question: { target: null, ratherThan: null, prompts: [], topFeatures: 0 },
  answer: null, // about the target that is shown
  whole: null, // what the server answered
  seen: null, // canvas with what the model sees
  layers: null, // what is drawn: heat of both maps, and the picture's pixels
  camera: null,
  running: null, // AbortController of the request under way
  told: 0, // when texts were last changed
};

const classes = new ClassList(find("#classes"), (target, ratherThan) => ask({ target, ratherThan }));
const patches = new Patches(document, find("#map"), factsOf);
const gates = new Gates(find("#gates"), () => patches.tell());

async function start() {
  try {
    state.model = await readModel();
  } catch (error) {
    fail(error);
    find("#key").hidden = error.code !== "unauthorised";
    if (find("#key").hidden) setTimeout(start, RETRY);
    return;
  }
  fail(null);
  find("#key").hidden = true;
  const { model, samples = [], takes_prompts: takesPrompts, grid, top_features: topFeatures } = state.model;
  state.question.topFeatures = Math.min(topFeatures ?? 0, 5);
  find("#about").textContent = aboutModel(state.model);
  document.title = `${model} – fga-fast`;
  find("#prompts").hidden = !takesPrompts;
  find("#map").setAttribute("aria-label", `Map of ${grid[0]} by ${grid[1]} patches`);
  offerSamples(find("#samples"), samples, open, fail);
}

function aboutModel({ model, classes: count, blocks, method, backward, version }) {
  const gated = blocks.length ? `gates after block${blocks.length > 1 ? "s" : ""} ${blocks.join(", ")}` : "without gates";
  const how = method.replaceAll("_", " ") + (backward === "exact" ? "" : `, ${backward} backward pass`);
  return [model, count ? `${count} classes` : "", gated, how, version && `fga-fast ${version}`].filter(Boolean).join(" · ");
}

/** Shows a problem in words; null takes away the one that is shown. */
function fail(error) {
  if (error?.name === "AbortError") return;
  if (error && !(error instanceof Problem)) console.error(error);
  const text = error ? (error instanceof Problem ? error.message : `This page failed: ${error}`) : "";
  if (find("#problem").textContent !== text) find("#problem").textContent = text; // said once, not at every frame
}

/** Explains a new picture, for its likeliest class. */
async function open(blob, name) {
  state.camera?.stop();
  try {
    const limit = state.model?.limits?.body_bytes ?? Infinity;
    const picture = { name, ...(await readable(blob)) };
    if (picture.blob.size > limit) {
      throw new Problem(`The file has ${megabytes(picture.blob.size)}; this server takes ${megabytes(limit)} at most.`);
    }
    Object.assign(state, { picture, seen: null });
    await ask({ target: null, ratherThan: null });
  } catch (error) {
    fail(error);
  }
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Asks the question, changed by `change`, of the picture or of the webcam's next frames. */
async function ask(change) {
  Object.assign(state.question, change);
  if (state.camera) return state.camera.ask(state.question);
  if (!state.picture) return undefined;
  // An answer to prompts is about each of them.
  if (state.seen && state.question.prompts.length && !change.prompts) return show(state.whole, state.pace);
  if (state.model?.classes === 0 && state.question.prompts.length === 0) {
    find("#prompt-lines").focus();
    return fail(new Problem("This model compares pictures with texts. Write prompts, one a line, then press Explain."));
  }
  state.running?.abort();
  const running = (state.running = new AbortController());
  const busy = setTimeout(() => setBusy(true), 150); // what is quicker needs no sign
  try {
    const began = performance.now();
    const answer = await explain(state.picture.blob, state.question, running.signal);
    if (running.signal.aborted) return undefined;
    const trip = performance.now() - began;
    state.seen ??= seenPart(state.picture.bitmap, answer.view, answer.image_size, STILL);
    fail(null);
    show(answer, { trip });
  } catch (error) {
    fail(error);
  } finally {
    clearTimeout(busy);
    if (state.running === running) setBusy(false);
  }
  return undefined;
}

function setBusy(isBusy) {
  find("#shown").setAttribute("aria-busy", String(isBusy));
  find("#said").classList.toggle("busy", isBusy);
  if (isBusy) find("#said").textContent = "Explaining …";
}

/** An answer about one of its targets: the one that is asked for, else the likeliest. */
function aboutOne(answer, target) {
  const asked = answer.targets.indexOf(target);
  const place = asked >= 0 ? asked : strongest(answer.targets.map((one) => answer.logits[one]));
  const one = (maps) => maps && [maps[place]];
  const each = (blocks) => blocks && Object.fromEntries(Object.entries(blocks).map(([block, maps]) => [block, one(maps)]));
  const { targets, values, relevance, ungated, scores, gates: served, features } = answer;
  return {
    ...answer, targets: one(targets), values: one(values), relevance: one(relevance), ungated: one(ungated),
    scores: each(scores), gates: each(served), features: each(features),
  };
}

/** Shows an answer. With the webcam, maps change with each frame, but texts only so fast that one can read them. */
function show(whole, pace) {
  const answer = aboutOne(whole, state.question.target);
  const signChanged = answer.signed !== state.answer?.signed;
  Object.assign(state, { answer, whole, pace });
  const { relevance, ungated, grid, signed } = answer;
  const size = [state.seen.height, state.seen.width];
  const heat = (values) => values && heatmap(values[0], grid, size, signed);
  state.layers = { relevance: heat(relevance), ungated: heat(ungated), pixels: pixelsOf(state.seen) };
  if (signChanged) offerColours(signed);
  find("#shown").hidden = find("#more").hidden = false;
  drawMaps();
  const now = performance.now();
  if (state.camera && now - state.told < CALM) return;
  state.told = now;
  classes.show(answer, namesOf(answer), state.question.prompts.length === 0);
  gates.show(answer);
  patches.show(relevance[0], grid);
  tellResult();
}

function namesOf({ logits }) {
  const { prompts } = state.question;
  const names = prompts.length === logits.length ? prompts : state.model.class_names;
  return logits.map((_, index) => names?.[index] ?? `Class ${index}`);
}

function offerColours(signed) {
  find("#colours").replaceChildren(...(signed ? SIGNED_NAMES : NAMES).map((name) => new Option(COLOURS[name] ?? name, name)));
}

/** Draws both maps, without the server. */
function drawMaps() {
  const { relevance, ungated, pixels } = state.layers;
  const [colours, opacity] = [find("#colours").value, Number(find("#opacity").value)];
  find("#opacity-value").textContent = percent(opacity).replace(".0", "");
  drawMap(find("#map canvas"), relevance, pixels, colours, opacity);
  find("#ungated").hidden = !ungated;
  if (ungated) drawMap(find("#ungated canvas"), ungated, pixels, colours, opacity);
  const values = state.answer.relevance[0];
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const end = Math.max(-low, high);
  const words = state.answer.signed
    ? [`against ${short(-end)}`, "0", `for ${short(end)}`]
    : [`low ${short(low)}`, `high ${short(high)}`];
  drawScale(find("#map-scale"), colours, words);
}

/** Titles, the sentence for screen readers, notices and milliseconds. */
function tellResult() {
  const { answer, pace } = state;
  const names = namesOf(answer);
  const [target, other] = [names[answer.targets[0]], names[answer.rather_than]];
  const gated = Object.keys(answer.gates).length > 0;
  // FGA and TransMM are names of relevance without a sign.
  find("#map-title").textContent = answer.signed ? "Relevance" : gated ? "FGA" : "TransMM";
  find("#ungated figcaption").textContent = answer.signed ? "Without gates" : "TransMM: without gates";
  find("#ungated .panel").setAttribute("aria-label", "The map without gates");
  find("#why").textContent = other ? `Why ${target} and not ${other}?` : `Why ${target}?`;
  const value = other ? `The outputs differ by ${short(answer.values[0])}` : `${target} ${classes.likely(answer.targets[0])}`;
  const place = patches.place(strongest(answer.relevance[0])).toLowerCase();
  const said = `${value}. The map is strongest at ${place}.`;
  // Readers hear of each still picture, but of the webcam only when another class comes out.
  if (!state.camera || state.saidOf !== target) find("#said").textContent = state.camera ? `Webcam: ${target}.` : said;
  state.saidOf = target;
  find("#plain").hidden = !other;
  find("#compare-hint").hidden = state.question.prompts.length > 0;
  find("#likeliest").setAttribute("aria-pressed", String(state.question.target === null));
  find("#pace").hidden = !state.camera;
  if (state.camera) {
    const { rate, trip, skipped, sent } = pace;
    find("#pace").textContent = `${rate.toFixed(1)} frames/s · ${milliseconds(trip)} ms from camera to map · ` +
      `${skipped} of ${sent} frames skipped for newer ones`;
  }
  find("#notices").replaceChildren(...answer.notices.map((text) => textOf("li", text)));
  const stages = [...Object.entries(answer.milliseconds), ["round trip", pace.trip]];
  find("#stages").replaceChildren(...stages.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(textOf("dt", name), textOf("dd", milliseconds(value)));
    return row;
  }));
}

function textOf(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

/** What is known of a patch, as rows of [name, text, address of more about it]. */
function factsOf(patch) {
  const { answer } = state;
  const values = answer.relevance[0];
  const rank = values.filter((value) => value > values[patch]).length + 1;
  const facts = [["Relevance", short(values[patch])], ["Rank", `${rank} of ${values.length}`]];
  if (answer.ungated) facts.push(["Without gates", short(answer.ungated[0][patch])]);
  for (const [block, found] of Object.entries(gates.shown)) {
    facts.push([`Gate, block ${block}`, `× ${short(found[patch])}`]);
  }
  const { cards } = state.model;
  for (const [block, found] of Object.entries(answer.features ?? {})) {
    for (const [feature, part] of found[0][patch]) {
      const address = cards && `${cards}#block-${block}-feature-${feature}`;
      facts.push([`Block ${block}, feature ${feature}`, `${part > 0 ? "+" : ""}${short(part)}`, address]);
    }
  }
  return facts;
}

async function toggleCamera() {
  const button = find("#webcam");
  if (state.camera) return state.camera.stop();
  state.running?.abort();
  Object.assign(state, { picture: null, told: 0 });
  Object.assign(state.question, { target: null, ratherThan: null });
  fail(null);
  find("#said").textContent = "Starting the webcam …";
  state.saidOf = null;
  let last = null;
  const camera = new Camera(Math.min(...(state.model?.image_size ?? [0])), {
    answered: (answer, frame, pace) => {
      fail(null);
      last = frame;
      state.seen = seenPart(frame, answer.view, answer.image_size, MOVING);
      show(answer, pace);
    },
    failed: fail,
    ended: () => {
      state.camera = null;
      button.textContent = "Start the webcam";
      find("#pace").hidden = true;
      // The last frame stays, and can be asked about like any picture.
      last?.toBlob((blob) => (state.picture ??= { blob, bitmap: last, name: "webcam" }), "image/png");
      if (!last) return;
      state.seen = seenPart(last, state.whole.view, state.whole.image_size, STILL);
      show(state.whole, state.pace);
    },
  });
  state.camera = camera;
  button.textContent = "Stop the webcam";
  return camera.start(state.question).catch(fail);
}

function nameOfFile(ending) {
  const name = `${state.picture?.name ?? "webcam"}-${namesOf(state.answer)[state.answer.targets[0]]}`;
  return `${name.replace(/\.\w+(?=-)/, "").replace(/[^\p{L}\p{N}]+/gu, "-")}.${ending}`;
}

listenForPictures(document, open, fail);
find("#webcam").addEventListener("click", toggleCamera);
find("#likeliest").addEventListener("click", () => ask({ target: null, ratherThan: null }));
find("#plain").addEventListener("click", () => {
  find("#likeliest").focus(); // this button goes away
  ask({ ratherThan: null });
});
for (const control of ["#opacity", "#colours"]) find(control).addEventListener("input", drawMaps);
find("#prompts").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompts = find("#prompt-lines").value.split("\n").map((line) => line.trim()).filter(Boolean);
  ask({ prompts, target: null, ratherThan: null });
});
find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(find("#token").value.trim());
  start();
});
find("#save-png").addEventListener("click", () => find("#map canvas").toBlob((blob) => save(blob, nameOfFile("png"))));
find("#save-json").addEventListener("click", () => {
  save(new Blob([JSON.stringify(state.whole)], { type: "application/json" }), nameOfFile("json"));
});
start();

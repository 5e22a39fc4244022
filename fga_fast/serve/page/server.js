/** All talk with the server. What goes wrong becomes a `Problem`, whose message is for people. */

/** What went wrong, in words; `code` is the server's name for it. */
export class Problem extends Error {
  constructor(message, code = "") {
    super(message);
    this.code = code;
  }
}

/** What the server reads. */
export const KINDS = new Set(["image/jpeg", "image/png", "image/webp"]);

const WORDS = {
  bad_image: "The server could not read this file as a picture.",
  too_large: "The picture is too large for this server.",
  bad_target: "This class, comparison or prompt cannot be explained.",
  unauthorised: "This server asks for a token, and none or a wrong one was given.",
  cross_origin: "The server answers only the pages that it serves itself.",
  busy: "The server is busy.",
  starting: "The server is still starting.",
  stopping: "The server is shutting down.",
  deadline: "The explanation took longer than this server allows.",
  internal: "Something went wrong in the server.",
};

/** What the server says of an error, with a sentence before it that says what it means here. */
export function inWords({ code, message }, retryAfter = null) {
  const again = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  return `${WORDS[code] ?? "The server refused."}${again}${message ? ` It says: ${message}` : ""}`;
}

let token = "";

/** The token to show from now on, where the server asks for one. */
export function setToken(text) {
  token = text;
}

async function ask(path, options = {}) {
  let reply;
  try {
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Check that it is running and that you are connected.");
  }
  if (reply.ok) return reply;
  const error = (await reply.json().catch(() => null))?.error ?? { message: `HTTP ${reply.status}` };
  throw new Problem(inWords(error, reply.headers.get("Retry-After")), error.code);
}

/** What the server says of its model. */
export async function readModel() {
  return (await ask("v1/model")).json();
}

export async function readSample(name) {
  return (await ask(`v1/samples/${encodeURIComponent(name)}`)).blob();
}

/** Explains one picture.
 *
 * `question` is { target, ratherThan, prompts, topFeatures }; `target` null asks for the likeliest class. Prompts stand
 * instead of targets: the answer is about all of them.
 */
export async function explain(picture, question, signal) {
  const options = { method: "POST", body: picture, headers: { "Content-Type": picture.type }, signal };
  return (await ask(`v1/explain?${parameters(question)}`, options)).json();
}

function parameters({ target, ratherThan, prompts, topFeatures }) {
  const query = new URLSearchParams(prompts.map((prompt) => ["prompt", prompt]));
  if (target !== null && !prompts.length) query.set("target", target);
  if (ratherThan !== null && !prompts.length) query.set("rather_than", ratherThan);
  if (topFeatures > 0) query.set("top_features", topFeatures);
  return query;
}

/** The first message of a stream, and each one that changes the question. */
export function streamSettings({ target, ratherThan, prompts }) {
  const settings = { top_features: 0, accept: "json" };
  if (prompts.length) settings.prompt = prompts;
  else Object.assign(settings, { target: target === null ? null : [target], rather_than: ratherThan });
  if (token) settings.token = token; // browsers send no header of ours with a WebSocket
  return JSON.stringify(settings);
}

export function streamAddress() {
  const address = new URL("v1/stream", document.baseURI);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  return address.href;
}

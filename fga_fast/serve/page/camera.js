/** The webcam: sends frames over one WebSocket and hands back each answer with the frame that it is about. */

import { Problem, inWords, streamAddress, streamSettings } from "./server.js";

const SHORT_SIDE = 256; // pixels of what is sent and shown, or more if the model sees more
const MARGIN = 1.15; // of the picture to what the model sees of it: most models see the middle
const QUALITY = 0.85;
const MOST = 8; // frames without an answer, while the first is on its way
const LONGEST_PAUSE = 500; // ms between frames, however slow the server
const WINDOW = 2000; // ms over which frames a second are counted

const REFUSALS = {
  NotAllowedError: "The browser was not allowed to use the camera. Allow it in the address bar, then try again.",
  NotFoundError: "No camera was found.",
  NotReadableError: "The camera is in use by another program.",
};

export class Camera {
  /**
   * `seen`: pixels of the shorter side of what the model sees. `answered(answer, frame, pace)` gets each result;
   * `failed(problem)` errors; `ended()` is called once at the end.
   */
  constructor(seen, { answered, failed, ended }) {
    Object.assign(this, { answered, failed, ended, side: Math.max(SHORT_SIDE, seen * MARGIN) });
    this.video = document.createElement("video");
    Object.assign(this.video, { muted: true, playsInline: true });
    this.frames = new Map(); // number -> { canvas, sent }, those without an answer yet
    this.times = []; // of the last answers
    this.sent = 0;
    this.skipped = 0;
    this.last = -1;
    this.trip = 0; // ms, the last round trip
    this.stopped = false;
    this.encoding = false; // a picture is on its way out
  }

  /** Opens camera and connection; throws a Problem if there is no camera. */
  async start(question) {
    if (!navigator.mediaDevices) {
      throw new Problem("Browsers lend the camera only to pages over HTTPS or from this computer (localhost).");
    }
    try {
      const size = { width: { ideal: 640 }, height: { ideal: 480 } };
      this.video.srcObject = await navigator.mediaDevices.getUserMedia({ video: size, audio: false });
      await this.video.play();
    } catch (error) {
      this.stop();
      throw new Problem(REFUSALS[error.name] ?? `The camera did not start: ${error.message}`);
    }
    if (this.stopped) return this._release();
    this.socket = new WebSocket(streamAddress());
    this.socket.onopen = () => {
      this.ask(question);
      this._wait();
    };
    this.socket.onmessage = (message) => this._receive(JSON.parse(message.data));
    this.socket.onclose = (event) => {
      if (this.stopped) return;
      const reason = event.reason || `code ${event.code}`;
      this.failed(new Problem(`The server ended the stream (${reason}). Start the webcam again.`));
      this.stop();
    };
  }

  /** Changes what is asked of the frames to come. */
  ask(question) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(streamSettings(question));
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    this.socket?.close();
    this._release();
    this.ended();
  }

  _release() {
    this.video.srcObject?.getTracks().forEach((track) => track.stop());
    this.video.srcObject = null;
  }

  /** Waits for the next picture of the camera. */
  _wait() {
    if (this.stopped) return;
    const next = () => this._frame();
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(next);
    else requestAnimationFrame(next);
  }

  /** Sends the picture that the camera shows now, unless one left only just now or is still on its way out.
   *
   * A third of a round trip lies between frames: so a fresh one is always there when the server takes its next, and
   * few are sent in vain.
   */
  async _frame() {
    this._wait(); // at once, since the camera does not wait until this picture is encoded
    const now = performance.now();
    const pause = Math.min(this.trip / 3, LONGEST_PAUSE);
    const early = now - (this.before ?? -Infinity) < pause || this.frames.size >= MOST;
    if (early || this.encoding || this.socket.bufferedAmount > 0 || !this.video.videoWidth) return;
    this.before = now;
    this.encoding = true;
    const canvas = this._picture();
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
    this.encoding = false;
    if (!blob || this.stopped || this.socket.readyState !== WebSocket.OPEN) return;
    this.frames.set(this.sent++, { canvas, sent: now });
    this.socket.send(blob);
  }

  _picture() {
    const { videoWidth: width, videoHeight: height } = this.video;
    const scale = Math.min(this.side / Math.min(width, height), 1);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    canvas.getContext("2d").drawImage(this.video, 0, 0, canvas.width, canvas.height);
    return canvas;
  }

  _receive(answer) {
    if (this.stopped) return;
    const frame = this.frames.get(answer.frame);
    if (answer.error) this.failed(new Problem(inWords(answer.error), answer.error.code));
    if (!frame) return;
    // Frames before this one were passed over by the server, and get no answer any more.
    for (const number of this.frames.keys()) if (number <= answer.frame) this.frames.delete(number);
    this.skipped += answer.frame - this.last - 1;
    this.last = answer.frame;
    if (answer.error) return;
    const now = performance.now();
    this.trip = now - frame.sent;
    this.times = [...this.times.filter((time) => now - time < WINDOW), now];
    const since = now - this.times[0];
    const rate = since > 0 ? ((this.times.length - 1) / since) * 1000 : 0;
    this.answered(answer, frame.canvas, { trip: this.trip, rate, skipped: this.skipped, sent: this.sent });
  }
}

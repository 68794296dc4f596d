"use strict";

// An error in words that can be shown; `param` names the option that is to blame.
class Problem extends Error {
  constructor(message, { param = null, status = 0, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { param, status, retryAfter });
  }
}

// Asks the server; throws a Problem for whatever is no answer.
async function ask(path, key, more = {}) {
  const headers = { ...more.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...more, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  throw problem(found.error, `The server answers ${response.status}.`, response.status, retryAfter);
}

function problem(error, otherwise, status = 0, retryAfter = 0) {
  return new Problem(error?.message || otherwise, { param: error?.param, status, retryAfter });
}

// Server-sent events as pairs of a name and its data.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).map((line) => line.match(/^(\w+): ?(.*)$/));
      const of = (name) => lines.filter((line) => line?.[1] === name).map((line) => line[2]);
      if (of("data").length) yield [of("event")[0], JSON.parse(of("data").join("\n"))];
    }
  }
}

// One text: what was asked, and what has come of it. Positions count from the first new token.
class Run {
  constructor(body, name) {
    Object.assign(this, { body, name, state: "waiting", start: null, done: null, error: null });
    this.steps = []; // those that wrote: { nfe, seconds, at, edited, count of tokens by then }
    this.written = []; // of each position [number of the step from 1, text, edited], as they came
    this.evaluations = 0;
    this.control = new AbortController();
  }

  get going() {
    return this.state === "waiting" || this.state === "writing";
  }

  // How many tokens the text has, as far as is known.
  get length() {
    return this.done ? this.done.usage.completion_tokens : this.written.length;
  }

  // Reads to the end; `changed` is called after all that came. Never throws.
  async read(key, changed) {
    const more = {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify(this.body),
      signal: this.control.signal,
    };
    try {
      const response = await ask("v1/denoise", key, more);
      for await (const [name, data] of events(response.body)) {
        this.take(name, data);
        changed();
      }
      if (this.going) throw new Problem("The connection ended before the text did.");
    } catch (error) {
      if (this.going) this.state = this.control.signal.aborted ? "cancelled" : "failed";
      if (this.state === "failed") {
        const lost = "The connection to the server was lost.";
        this.error = error instanceof Problem ? error : new Problem(lost);
      }
    }
    changed();
  }

  cancel() {
    if (this.going) this.state = "cancelled";
    this.control.abort();
  }

  take(name, data) {
    if (name === "start") {
      this.start = data;
      this.state = "writing";
    } else if (name === "step") {
      this.evaluations = data.nfe;
      if (data.at.length) this.write(data);
    } else if (name === "done") {
      this.finish(data);
    } else if (name === "error") {
      this.state = "failed";
      this.error = problem(data.error, "The server could not go on.");
    }
  }

  // Only now is each token's piece of the text known: a character may be spread over several.
  finish(data) {
    this.done = data;
    this.evaluations = data.usage.evaluations;
    this.state = "done";
    data.pieces.forEach((piece, position) => {
      const last = this.written[position]?.at(-1);
      if (last) last[1] = piece;
    });
    const begin = Math.max(data.pieces.join("").indexOf(data.text), 0);
    let end = 0;
    const ends = data.pieces.map((piece) => (end += piece.length));
    // Behind the text are its end's own token, or a text that was to stop it.
    this.behind = data.pieces.findIndex((_, i) => ends[i] > begin + data.text.length);
  }

  write({ nfe, seconds, at, text, edited }) {
    const number = this.steps.length + 1;
    let count = number > 1 ? this.steps.at(-1).count : 0;
    at.forEach((position, i) => {
      while (this.written.length <= position) this.written.push([]);
      const before = this.written[position];
      if (!before.length) count += 1;
      before.push([number, text[i], edited.includes(position)]);
    });
    this.steps.push({ nfe, seconds, at, edited, count });
  }

  // How many of the steps there were by an evaluation.
  stepsBy(nfe) {
    const later = this.steps.findIndex((step) => step.nfe > nfe);
    return later < 0 ? this.steps.length : later;
  }

  // What stood at a position after so many steps, undefined for a mask.
  at(position, steps) {
    return this.written[position]?.findLast(([number]) => number <= steps);
  }
}

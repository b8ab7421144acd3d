// The server's API: requests with the key, event streams, and errors as one class.
import { Signal } from "./dom.js";

const KEY = "mnemos.key";

/** The question for a key that waits for the user: null, or {wrong, answer(key or null)}. */
export const keyQuestion = new Signal(null);

/** An answer that is no success. `status` is 0 where there was none: the connection failed or was lost. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get connection() {
    return this.status === 0;
  }
}

export function apiKey() {
  return localStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

let asking = null;

/** Asks once, however many requests were refused at the same time. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    keyQuestion.value = {
      wrong: Boolean(apiKey()),
      answer(key) {
        keyQuestion.value = null;
        asking = null;
        if (key) setApiKey(key);
        resolve(Boolean(key));
      },
    };
  });
  return asking;
}

/** Sends a request and returns the response of a success; everything else is an ApiError. */
export async function send(path, { body, signal, quiet = false } = {}) {
  const key = apiKey();
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(new URL(path, document.baseURI), { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server does not answer.");
  }
  if (response.ok) return response;
  if (response.status === 401 && !quiet) {
    if (key !== apiKey() || (await askForKey())) return send(path, { body, signal });
  }
  const content = await response.json().catch(() => null);
  const error = content?.error ?? {};
  throw new ApiError(error.message ?? `The server answered with status ${response.status}.`, response.status, error.code);
}

export async function getJson(path, options) {
  return (await send(path, options)).json();
}

/** The data of a server-sent event stream, one string an event. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of a streamed chat completion. A stream that ends without its end mark is a lost connection. */
export async function* streamChat(body, signal) {
  const response = await send("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.status ?? 500, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection was lost.");
  }
  throw new ApiError("The connection was lost.");
}

/** What the engine does, about twice a second, until the signal aborts. */
export async function* engineLive(signal) {
  for await (const data of events(await send("engine/live", { signal, quiet: true }))) yield JSON.parse(data);
}

// The server's API: requests, streams of events, its errors.

const TOKEN = "foveate-token";

/** An answer that is an error: the server's one sentence, and when to come back. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** Whether the same request may be answered later. */
  get passing() {
    return [0, 408, 429, 503, 504].includes(this.status);
  }
}

let kept = null; // where storage is forbidden

function storage() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

export const token = {
  get: () => storage()?.getItem(TOKEN) ?? kept,
  set(value) {
    kept = value;
    storage()?.setItem(TOKEN, value);
  },
  drop() {
    kept = null;
    storage()?.removeItem(TOKEN);
  },
};

let askForToken = async () => null;

/** Sets who is asked for a token when the server wants one: called with its sentence, gives a token or null. */
export function onTokenWanted(ask) {
  let open = null;
  askForToken = (why) => {
    open ??= ask(why).finally(() => {
      open = null;
    });
    return open;
  };
}

/** Fetches; a server that wants a token gets one, an error becomes an ApiError. */
async function request(path, options = {}) {
  for (;;) {
    const sent = token.get();
    const headers = { ...options.headers, ...(sent ? { Authorization: `Bearer ${sent}` } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached, or it ended the connection; see whether it still runs.");
    }
    if (answer.ok) return answer;
    const error = await errorOf(answer);
    if (answer.status !== 401) throw error;
    // Another request may have been given a token meanwhile.
    if (token.get() === sent && !(await askForToken(sent ? error.message : ""))) throw error;
  }
}

async function errorOf(answer) {
  let said = null;
  try {
    said = (await answer.json()).error;
  } catch {
    // A proxy in between may answer with something else than JSON.
  }
  const seconds = Number.parseFloat(answer.headers.get("retry-after"));
  return new ApiError(said?.message || `The server answered ${answer.status} ${answer.statusText}`.trim() + ".", {
    status: answer.status,
    code: said?.code ?? null,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

export async function getJson(path) {
  return (await request(path)).json();
}

function formOf(blob, fields) {
  const form = new FormData();
  form.set("image", blob, "picture");
  for (const [name, value] of Object.entries(fields)) form.set(name, JSON.stringify(value));
  return form;
}

/** Regions of a picture: yields { event, data } of a stream. `path` is /v1/regions or /v1/everything. */
export async function* regionEvents(path, blob, fields, signal) {
  const answer = await request(path, { method: "POST", body: formOf(blob, { ...fields, stream: true }), signal });
  let complete = false;
  for await (const { event, data } of events(answer)) {
    const parsed = JSON.parse(data);
    if (event === "error") throw new ApiError(parsed.error.message, { status: 503, code: parsed.error.code });
    complete ||= event === "done";
    yield { event, data: parsed };
  }
  if (!complete) throw new ApiError("The answer broke off; send the request again.", { status: 503 });
}

/** An answer to messages: yields { text } as it is said, then { looked }, what the answer was made of. */
export async function* chatPieces(body, signal) {
  const answer = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const { data } of events(answer)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { status: 503, code: chunk.error.code });
    const text = chunk.choices[0]?.delta.content;
    if (text) yield { text };
    if (chunk.foveate) yield { looked: chunk.foveate };
  }
  throw new ApiError("The answer broke off; ask again.", { status: 503 });
}

/** What the server says of a picture's file that the browser cannot show; null if the server can read it. */
export async function refusalOf(blob) {
  try {
    await request("/v1/regions", { method: "POST", body: formOf(blob, { tasks: ["category"] }) });
    return null;
  } catch (error) {
    return error;
  }
}

/** Server-sent events of an answer. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest = (rest + value).replaceAll("\r\n", "\n");
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const lines = rest.slice(0, end).split("\n");
        rest = rest.slice(end + 2);
        const field = (name) =>
          lines
            .filter((line) => line.startsWith(`${name}:`))
            .map((line) => line.slice(name.length + 1).replace(/^ /, ""))
            .join("\n");
        const data = field("data");
        if (data) yield { event: field("event"), data };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete; send the request again.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

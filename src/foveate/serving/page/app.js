// The page: opens pictures, holds the two tabs together, says what happens and what went wrong.

import { ApiError, getJson, onTokenWanted, refusalOf, token } from "./api.js";
import { Ask } from "./ask.js";
import { Describe } from "./describe.js";
import { $, make } from "./dom.js";
import { Stage } from "./stage.js";

const models = {};
let limits = {};
let opening = 0;

const page = {
  say(text) {
    $("status").textContent = text;
  },
  fail,
  /** A request goes out: what is said of earlier ones is past. */
  busy(verb) {
    closeToast();
    const model = models[verb];
    if (model && !model.loaded) page.say(`${model.id} is being loaded; the first answer takes longer.`);
  },
  answered(verb) {
    if (models[verb]) models[verb].loaded = true;
  },
  /** Whether the server would not take so much, which is then said: it ends such uploads before it answers. */
  tooLarge(name, has, size) {
    if (!limits.max_request_bytes || size <= limits.max_request_bytes) return false;
    const [bytes, most] = [size, limits.max_request_bytes].map((value) => (value / 2 ** 20).toFixed(1));
    const said = `${name} ${has} ${bytes} MiB, more than the ${most} MiB that this server takes; give a smaller file.`;
    fail(new ApiError(said, { status: 413 }));
    return true;
  },
  copied(done, said) {
    if (done) page.say(said);
    else fail(new ApiError("The browser does not let this page copy; use the API instead.", { status: 400 }));
  },
};

const stage = new Stage({
  drawn: (box) => describe.draw(box),
  changed: (id, box) => describe.change(id, box),
  removed: (id) => describe.remove(id),
  chosen: (id) => describe.choose(id),
  opened(id, focus) {
    if (!$("panel-describe").hidden) describe.open(id, focus);
    else if (focus) {
      showTab("describe");
      describe.open(id, focus);
    } else describe.choose(id);
  },
});
const describe = new Describe(stage, page);
const ask = new Ask(stage, describe, page);
describe.onBoxes = (count) => ask.countBoxes(count);

// ---------------------------------------------------------------------------------------------------------------------
// Pictures
// ---------------------------------------------------------------------------------------------------------------------

/** Opens a picture's file; what was open stays if it cannot be read. */
async function open(blob, name, sample = null) {
  const number = ++opening;
  closeToast();
  if (page.tooLarge(name, "has", blob.size)) return;
  const dataUrl = await dataUrlOf(blob);
  const probe = new Image();
  probe.src = dataUrl;
  let readable = true;
  try {
    await probe.decode();
  } catch {
    readable = false;
  }
  if (number !== opening) return; // another was opened meanwhile
  if (!readable) {
    page.say("Asking the server about the file …");
    const refusal = models.describe ? await refusalOf(blob) : null;
    if (number !== opening) return;
    page.say("");
    fail(
      refusal ??
        new ApiError(`${name} cannot be shown by this browser; save it as PNG, JPEG or WebP.`, { status: 400 }),
    );
    return;
  }
  try {
    await stage.show(dataUrl, name);
  } catch (error) {
    if (stage.image.src === dataUrl) throw error;
  }
  if (stage.image.src !== dataUrl) return; // another is shown by now
  const picture = { blob, name, dataUrl, questions: sample?.questions ?? [], rendered: sample !== null };
  $("empty").hidden = true;
  $("look-title").textContent = name;
  describe.setPicture(picture);
  ask.setPicture(picture);
  const [width, height] = stage.size;
  page.say(`${width} × ${height} pixels.`);
  for (const note of document.querySelectorAll(".note")) {
    note.classList.toggle("warns", note.dataset.worldOnly === "true" && !picture.rendered);
  }
  for (const button of $("samples").children) {
    button.setAttribute("aria-pressed", String(button.dataset.name === (sample?.name ?? "")));
  }
}

function dataUrlOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      // Files without a known ending have no type, or another than image; the server looks at what is in them.
      const [head, data] = reader.result.split(",", 2);
      resolve(`${head.startsWith("data:image/") ? head : "data:image/unknown;base64"},${data ?? ""}`);
    };
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

const openFile = (file) =>
  open(file, file.name || "pasted picture").catch((error) => {
    fail(
      new ApiError(`${file.name || "The picture"} cannot be read (${error.message}); choose it again.`, {
        status: 400,
      }),
    );
  });

$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) openFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  if (!file) return;
  event.preventDefault();
  openFile(file);
});
const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    $("frame").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("frame").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("frame").classList.remove("over");
  if (event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
});

async function showSamples() {
  const { data } = await getJson("/v1/samples");
  $("samples").replaceChildren(
    ...data.map((sample) => {
      const click = () => open(blobOf(sample.image), sample.name, sample);
      return make(
        "button",
        {
          type: "button",
          class: "sample",
          "data-name": sample.name,
          "aria-pressed": "false",
          "aria-label": sample.name,
          on: { click },
        },
        make("img", { src: sample.image, alt: "" }),
      );
    }),
  );
}

/** The file in a data: URL, which the page's policy forbids to fetch. */
function blobOf(url) {
  const [head, data] = url.split(",", 2);
  return new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], {
    type: head.slice(5).split(";")[0],
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Models
// ---------------------------------------------------------------------------------------------------------------------

async function showModels() {
  const listed = await getJson("/v1/models");
  limits = listed.limits;
  for (const model of listed.data) models[model.verb] = model;
  for (const [verb, part] of [
    ["describe", describe],
    ["ask", ask],
  ]) {
    const model = models[verb] ?? null;
    part.model = model;
    const note = $(`note-${verb}`);
    note.dataset.worldOnly = String(Boolean(model?.world_only));
    note.replaceChildren();
    if (!model) {
      note.textContent = `This server has no model to ${verb}.`;
      continue;
    }
    const said = model.note?.startsWith(`${model.id} `) ? model.note.slice(model.id.length + 1) : model.note;
    if (model.note && said !== model.note) note.append(make("b", {}, model.id), ` answers. It ${said}`);
    else note.append(make("b", {}, model.id), " answers.", ...(said ? [` ${said}`] : []));
  }
  if (!models.describe && models.ask) showTab("ask");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tabs
// ---------------------------------------------------------------------------------------------------------------------

const tabs = ["describe", "ask"];

function showTab(name, focus = false) {
  for (const own of tabs) {
    const is = own === name;
    $(`tab-${own}`).setAttribute("aria-selected", String(is));
    $(`tab-${own}`).tabIndex = is ? 0 : -1;
    $(`panel-${own}`).hidden = !is;
  }
  if (focus) $(`tab-${name}`).focus();
  describe.choose(null); // what it looked at is the other tab's matter
  ask.show(name === "ask");
}

for (const [index, name] of tabs.entries()) {
  $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    showTab(tabs[(to + tabs.length) % tabs.length], true);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors, the token, the scheme
// ---------------------------------------------------------------------------------------------------------------------

let countdown = null;

/** Shows an error's sentence; `retry` is offered where the same request may be answered later. */
function fail(error, retry = null) {
  closeToast();
  if (!(error instanceof ApiError)) console.error(error);
  $("toast-text").textContent = error.message;
  const again = $("toast-retry");
  again.hidden = !retry || !error.passing;
  again.onclick = () => {
    closeToast();
    retry();
  };
  let left = Math.ceil(error.retryAfter ?? 0);
  const tell = () => {
    again.disabled = left > 0;
    again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
    left -= 1;
  };
  tell();
  if (left >= 0) countdown = setInterval(tell, 1000);
  $("toast").hidden = false;
}

function closeToast() {
  clearInterval(countdown);
  $("toast").hidden = true;
}

$("toast-close").addEventListener("click", closeToast);

onTokenWanted(
  (why) =>
    new Promise((resolve) => {
      const dialog = $("token-dialog");
      $("token-change").hidden = false;
      $("token-why").textContent = why;
      $("token").value = "";
      dialog.returnValue = "";
      dialog.showModal();
      $("token-form").onsubmit = () => {
        token.set($("token").value.trim());
        resolve(true);
      };
      dialog.onclose = () => resolve(null); // without effect after a submit
    }),
);
$("token-cancel").addEventListener("click", () => $("token-dialog").close());
$("token-change").hidden = !token.get();
$("token-change").addEventListener("click", () => {
  token.drop();
  start();
});

const schemes = ["auto", "light", "dark"];

function showScheme(scheme) {
  const root = document.documentElement;
  if (scheme === "auto") delete root.dataset.theme;
  else root.dataset.theme = scheme;
  $("theme-name").textContent = scheme[0].toUpperCase() + scheme.slice(1);
  $("theme").setAttribute("aria-label", `Colour scheme: ${scheme}`);
}

$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  const next = schemes[(schemes.indexOf(now) + 1) % schemes.length];
  showScheme(next);
  try {
    localStorage.setItem("foveate-theme", next);
  } catch {
    // Storage may be forbidden; the scheme then holds until the page is left.
  }
});

async function start() {
  try {
    await showModels();
    await showSamples();
  } catch (error) {
    fail(error, start);
  }
}

showScheme(document.documentElement.dataset.theme ?? "auto");
start();

// The settings: which fields there are (the server says so), and what this browser prefers.
import { getJson } from "./api.js";
import { Signal } from "./dom.js";

/** What the server offers: models, the description of all settings, why they are not known yet, and whether for want of a key. */
export const server = new Signal({ models: [], fields: [], problem: "", locked: false });

/** This browser's preferences. `inside`: replies come with probabilities; `settings`: for new conversations. */
export const preferences = new Signal({
  theme: "", model: "", settings: {}, inside: true, sidebar: true,
  ...JSON.parse(localStorage.getItem("mnemos.preferences") ?? "{}"),
});

export function prefer(fields) {
  preferences.value = { ...preferences.value, ...fields };
  localStorage.setItem("mnemos.preferences", JSON.stringify(preferences.value));
  if ("theme" in fields) applyTheme();
}

function applyTheme() {
  const { theme } = preferences.value;
  if (theme) {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("mnemos.theme", theme);
  } else {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("mnemos.theme");
  }
}

// What the page sets itself, or what has no meaning in a conversation with one reply at a time.
const MANAGED = new Set(["logprobs", "num_return_sequences", "best_of", "tenant", "cache_salt", "priority", "deadline", "adapter"]);

/** Asks again for the models: a model says how long its context is once it is loaded. */
export async function refreshModels() {
  const { data } = await getJson("v1/models");
  server.value = { ...server.value, models: data };
}

/** Asks the server until it answers. */
export async function connect() {
  for (;;) {
    try {
      const [{ data }, fields] = await Promise.all([getJson("v1/models"), getJson("generation-fields")]);
      const editable = fields.filter((field) => !MANAGED.has(field.name) && field.kind !== "callable");
      server.value = { models: data, fields: editable, problem: "", locked: false };
      return;
    } catch (error) {
      const locked = error.status === 401;
      server.value = { ...server.value, problem: locked ? "This server asks for an API key." : error.message, locked };
      if (locked) return;
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

export function modelNamed(name) {
  return server.value.models.find((model) => model.id === name);
}

/** The model's context in tokens; null if the server does not say. */
export function contextOf(name) {
  const model = modelNamed(name);
  return model?.context_length ?? model?.max_model_len ?? model?.meta?.n_ctx ?? null;
}

/** Reads what was typed for a field: {value}, {value: undefined} for nothing, or {problem}. */
export function readField(field, typed) {
  const text = String(typed).trim();
  if (text === "") return { value: undefined };
  if (field.kind === "integer" || field.kind === "number") {
    const number = Number(text);
    if (Number.isNaN(number) || (field.kind === "integer" && !Number.isInteger(number))) {
      return { problem: field.kind === "integer" ? "A whole number, please" : "A number, please" };
    }
    return outOf(field, number) ? { problem: outOf(field, number) } : { value: number };
  }
  if (field.kind === "flag") return { value: text === "true" };
  if (field.kind === "name" || field.kind === "text") return { value: typed };
  if (field.kind === "list" && (field.item === "text" || field.item === "integer")) {
    const lines = String(typed).split(field.item === "text" ? "\n" : /[\s,]+/).filter((line) => line.trim() !== "");
    const items = field.item === "text" ? lines.map(unescaped) : lines.map(Number);
    return items.every((item) => !Number.isNaN(item)) ? { value: items } : { problem: "Whole numbers, please" };
  }
  try {
    return { value: JSON.parse(text) };
  } catch {
    return { problem: "JSON, please" };
  }
}

function outOf(field, number) {
  // -1 is what other programs write for "off"; the server knows where it means that.
  if (field.minimum !== null && number < field.minimum && number !== -1) return `At least ${field.minimum}`;
  return field.maximum !== null && number > field.maximum ? `At most ${field.maximum}` : "";
}

const unescaped = (line) => line.replace(/\\n/g, "\n").replace(/\\t/g, "\t");

/** The text in the input for a field's value. */
export function writeField(field, value) {
  if (value === undefined || value === null) return "";
  if (field.kind === "list" && Array.isArray(value) && field.item === "text") {
    return value.map((item) => item.replace(/\n/g, "\\n").replace(/\t/g, "\\t")).join("\n");
  }
  if (field.kind === "list" && field.item === "integer" && Array.isArray(value)) return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

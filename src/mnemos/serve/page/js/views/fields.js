// The form of all generation settings, made from the server's description of them.
import { classes, html, useEffect, useState } from "../dom.js";
import { readField, server, writeField } from "../settings.js";
import { useSignal } from "../dom.js";
import { IconButton } from "./icons.js";

const FIRST = ["temperature", "top_p", "min_p", "top_k", "max_new_tokens", "seed"];

function Input({ field, id, typed, invalid, onType }) {
  const shared = { id, class: "input", "aria-describedby": `${id}-help`, "aria-invalid": invalid ? "true" : undefined };
  const type = (event) => onType(event.target.value);
  const unset = field.default === null || field.default === undefined ? "" : writeField(field, field.default);
  if (field.kind === "flag" || field.kind === "name") {
    const choices = field.kind === "flag" ? ["true", "false"] : field.choices;
    const names = field.kind === "flag" ? { true: "yes", false: "no" } : {};
    const label = unset === "" ? "–" : `${names[unset] ?? unset} (default)`;
    return html`<select ...${shared} value=${typed} onChange=${type}>
      <option value="" selected=${typed === ""}>${label}</option>
      ${choices.map((choice) => html`<option value=${choice} selected=${typed === choice}>${names[choice] ?? choice}</option>`)}
    </select>`;
  }
  if (field.kind === "integer" || field.kind === "number") {
    return html`<input ...${shared} inputmode=${field.kind === "integer" ? "numeric" : "decimal"} placeholder=${unset || "–"}
      value=${typed} onInput=${type} autocomplete="off" />`;
  }
  const lines = field.kind === "list" && field.item === "text";
  const long = lines || !(field.kind === "text" || field.kind === "list" || field.kind === "pair");
  const hint = unset && unset !== "{}" ? unset : lines ? "one a line" : field.metavar;
  return long
    ? html`<textarea ...${shared} rows="2" placeholder=${hint} value=${typed} onInput=${type} spellcheck="false" />`
    : html`<input ...${shared} placeholder=${hint} value=${typed} onInput=${type} autocomplete="off" spellcheck="false" />`;
}

function Setting({ field, value, onChange, idPrefix }) {
  const [typed, setTyped] = useState(writeField(field, value));
  const [problem, setProblem] = useState("");
  const id = `${idPrefix}-${field.name}`;
  const changed = value !== undefined;
  useEffect(() => {
    // The value was changed from outside: by a reset, or because another conversation was opened.
    if (JSON.stringify(readField(field, typed).value) !== JSON.stringify(value) && !problem) setTyped(writeField(field, value));
  }, [value]);
  const type = (text) => {
    setTyped(text);
    const read = readField(field, text);
    setProblem(read.problem ?? "");
    if (!read.problem) onChange(field.name, read.value);
  };
  const reset = () => {
    setTyped("");
    setProblem("");
    onChange(field.name, undefined);
  };
  return html`<div class=${classes("setting", changed && "changed", field.kind)}>
    <label for=${id}>${field.name.replaceAll("_", " ")}</label>
    ${changed && html`<${IconButton} icon="reset" label=${`Reset ${field.name.replaceAll("_", " ")}`} onClick=${reset} />`}
    <${Input} ...${{ field, id, typed }} invalid=${problem} onType=${type} />
    <p class="help" id=${`${id}-help`}>${problem ? html`<strong class="problem">${problem}.</strong> ` : ""}${field.help}</p>
  </div>`;
}

/** All settings in groups; `values` holds those that are set. `onChange(name, value)`, with undefined for a reset. */
export function SettingsForm({ values, onChange, idPrefix = "setting" }) {
  const { fields } = useSignal(server);
  const [wanted, setWanted] = useState("");
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (field) => {
    const text = `${field.name.replaceAll("_", " ")} ${field.name} ${field.help}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const show = (field) =>
    html`<${Setting} key=${field.name} field=${field} value=${values[field.name]} onChange=${onChange} idPrefix=${idPrefix} />`;
  const found = fields.filter(matches);
  const first = FIRST.map((name) => fields.find((field) => field.name === name)).filter(Boolean);
  const groups = [...new Set(fields.map((field) => field.group))];
  return html`<div class="settings-form">
    <input class="input" type="search" placeholder="Find a setting" aria-label="Find a setting" value=${wanted}
      onInput=${(event) => setWanted(event.target.value)} />
    ${words.length
      ? html`<div class="group">${found.map(show)}${!found.length && html`<p class="help">No setting is called that.</p>`}</div>`
      : html`<div class="group">${first.map(show)}</div>
          ${groups.map((group) => {
            const own = fields.filter((field) => field.group === group && !FIRST.includes(field.name));
            const set = own.filter((field) => values[field.name] !== undefined).length;
            const title = fields.find((field) => field.group === group).title.replace(/ \(.*/, "");
            return own.length > 0 && html`<details key=${group} class="group">
              <summary>${title}${set > 0 && html`<span class="badge" title=${`${set} changed`}>${set}</span>`}</summary>
              ${own.map(show)}
            </details>`;
          })}`}
  </div>`;
}

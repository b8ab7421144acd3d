// The settings of the open conversation, and of this page.
import { apiKey, setApiKey } from "../api.js";
import * as chats from "../chats.js";
import { html, useEffect, useRef, useSignal } from "../dom.js";
import { prefer, preferences } from "../settings.js";
import { SettingsForm } from "./fields.js";
import { IconButton } from "./icons.js";

function Choice({ label, value, options, onChange, help }) {
  return html`<div class="setting"><label for=${`page-${label}`}>${label}</label>
    <select id=${`page-${label}`} class="input" value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([name, text]) => html`<option value=${name} selected=${value === name}>${text}</option>`)}
    </select>${help && html`<p class="help">${help}</p>`}</div>`;
}

export function SettingsPanel({ onClose }) {
  const conversation = useSignal(chats.open);
  const { theme, inside } = useSignal(preferences);
  const panel = useRef(null);
  const { record } = conversation;
  useEffect(() => panel.current.querySelector("textarea").focus(), []);

  const change = (name, value) => {
    const settings = { ...record.settings, [name]: value };
    if (value === undefined) delete settings[name];
    chats.edit(conversation, { settings });
    prefer({ settings }); // the next conversation begins with them
  };
  const reset = () => {
    chats.edit(conversation, { settings: {} });
    prefer({ settings: {} });
  };
  const keys = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    onClose();
  };
  const changed = Object.keys(record.settings).length;
  return html`<aside class="panel" aria-label="Settings" ref=${panel} onKeyDown=${keys}>
    <header><h2>Settings</h2><${IconButton} icon="close" label="Close the settings" onClick=${onClose} /></header>
    <div class="panel-body">
      <section>
        <label class="section-title" for="system">System message</label>
        <textarea id="system" class="input" rows="4" placeholder="How the model should behave in this conversation" value=${record.system}
          onInput=${(event) => chats.edit(conversation, { system: event.target.value })} />
      </section>
      <section>
        <div class="section-title"><h3>Generation</h3>${changed > 0 && html`<button type="button" class="button small" onClick=${reset}>Reset all (${changed})</button>`}</div>
        <${SettingsForm} values=${record.settings} onChange=${change} />
      </section>
      <section>
        <h3 class="section-title">This page</h3>
        <${Choice} label="Appearance" value=${theme} options=${[["", "as the system"], ["light", "light"], ["dark", "dark"]]}
          onChange=${(value) => prefer({ theme: value })} />
        <${Choice} label="Probabilities" value=${inside ? "on" : ""} options=${[["on", "come with each reply"], ["", "are left out"]]}
          onChange=${(value) => prefer({ inside: Boolean(value) })} help="Look inside needs them. They make a history larger." />
        ${apiKey() && html`<button type="button" class="button small" onClick=${() => (setApiKey(""), location.reload())}>Forget the API key</button>`}
      </section>
    </div>
  </aside>`;
}

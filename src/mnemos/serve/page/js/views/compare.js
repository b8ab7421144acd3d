// Side by side: one prompt under up to four strategies or models at once.
import { streamChat } from "../api.js";
import * as chats from "../chats.js";
import { Signal, announce, html, newId, useSignal, useState } from "../dom.js";
import { Stopwatch, promptOf, requestFields } from "../replies.js";
import { contextOf, preferences, prefer, server } from "../settings.js";
import { perplexity, readTokens } from "../tokens.js";
import { Composer } from "./composer.js";
import { Dialog } from "./dialogs.js";
import { SettingsForm } from "./fields.js";
import { Icon, IconButton } from "./icons.js";
import { Figures, Markdown } from "./message.js";

const MOST = 4;
const LONGEST = 512; // tokens of a reply, if its column has no limit of its own
export const STRATEGIES = {
  Greedy: { temperature: 0 },
  "Sampling": { temperature: 0.8, top_p: 0.95 },
  "Hot sampling": { temperature: 1.5, min_p: 0.05 },
  "Min-p": { temperature: 1, min_p: 0.1 },
  "Typical": { temperature: 1, typical_p: 0.9 },
  "Mirostat 2": { mirostat: 2 },
  "Beam search": { num_beams: 4 },
  "Diverse beams": { num_beams: 4, num_beam_groups: 4, diversity_penalty: 1 },
  "Contrastive": { penalty_alpha: 0.6, top_k: 4 },
};

function column(strategy, fields = {}) {
  return { id: newId(), strategy, settings: STRATEGIES[strategy] ?? {}, model: "", reply: null, ...fields };
}

/** The columns, and the prompt that they answer. Kept while other views are open. */
const state = new Signal({
  prompt: null,
  columns: (preferences.value.columns ?? [{ strategy: "Greedy" }, { strategy: "Sampling" }, { strategy: "Contrastive" }]).map(
    ({ strategy, ...fields }) => column(strategy, fields),
  ),
});

function change(id, fields) {
  const columns = state.value.columns.map((one) => (one.id === id ? { ...one, ...fields } : one));
  state.current = { ...state.value, columns };
  state.changed({ calm: true });
}

function configure(columns) {
  state.value = { ...state.value, columns };
  prefer({ columns: columns.map(({ strategy, settings, model }) => ({ strategy, settings, model })) });
}

function editColumn(id, fields) {
  configure(state.value.columns.map((one) => (one.id === id ? { ...one, ...fields } : one)));
}

async function answer({ id, model, settings }, prompt) {
  const controller = new AbortController();
  const watch = new Stopwatch();
  const reply = { content: "", reasoning: "", tokens: [], stats: null, error: null, controller };
  const show = (fields) => change(id, { reply: Object.assign(reply, fields) && { ...reply } });
  show({});
  try {
    const body = { ...requestFields(model || defaultModel(), { max_new_tokens: LONGEST, ...settings }), messages: [{ role: "user", content: prompt }] };
    for await (const chunk of streamChat(body, controller.signal)) {
      if (chunk.usage) watch.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      const added = choice?.logprobs?.content ?? [];
      if (!choice) continue;
      reply.tokens.push(...readTokens(added));
      if (choice.delta?.content || choice.delta?.reasoning_content || added.length) watch.count(added.length || 1);
      show({
        content: reply.content + (choice.delta?.content ?? ""),
        reasoning: reply.reasoning + (choice.delta?.reasoning_content ?? ""),
        stats: watch.figures,
      });
    }
  } catch (error) {
    if (!controller.signal.aborted) show({ error: error.message });
  }
  show({ controller: null, stats: watch.first === null ? null : watch.figures });
}

const defaultModel = () => preferences.value.model || server.value.models[0]?.id || "";

async function answerAll(prompt, only = null) {
  state.value = { ...state.value, prompt };
  const columns = state.value.columns.filter((one) => !only || one.id === only);
  stopAll(columns);
  announce("Replies started");
  await Promise.all(columns.map((one) => answer(one, prompt)));
  announce("All replies are complete");
}

function stopAll(columns) {
  for (const { reply } of columns) reply?.controller?.abort();
}

async function toConversation({ model, settings, reply }, prompt) {
  const conversation = chats.newConversation({ model: model || defaultModel(), settings });
  const user = chats.add(conversation, { parent: conversation.record.id, role: "user", content: prompt });
  const fields = { role: "assistant", model: conversation.record.model, content: reply.content, reasoning: reply.reasoning };
  const node = chats.add(conversation, { parent: user.id, ...fields, stats: reply.stats, finish: "stop" });
  if (reply.tokens.length) chats.setTokens(node.id, reply.tokens, true);
  await chats.save(conversation, [node], true);
  chats.open.value = conversation;
  location.hash = `#/chat/${conversation.record.id}`;
}

const words = (settings) =>
  Object.entries(settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");

function Column({ one, prompt, models, onSettings }) {
  const { reply } = one;
  const busy = Boolean(reply?.controller);
  const name = one.model || defaultModel();
  const choose = (event) => {
    const strategy = event.target.value;
    if (strategy === "own") onSettings(one.id);
    else editColumn(one.id, { strategy, settings: STRATEGIES[strategy] });
  };
  return html`<section class="column" aria-label=${`${one.strategy}, ${name}`} aria-busy=${busy ? "true" : "false"}>
    <header>
      <div class="column-choices">
        <select class="input" aria-label="Strategy" value=${one.strategy} onChange=${choose}>
          ${Object.keys(STRATEGIES).map((strategy) => html`<option value=${strategy} selected=${strategy === one.strategy}>${strategy}</option>`)}
          ${!STRATEGIES[one.strategy] && html`<option value=${one.strategy} selected>${one.strategy}</option>`}
        </select>
        <${IconButton} icon="sliders" label="Settings of this column" onClick=${() => onSettings(one.id)} />
        <${IconButton} icon="close" label="Remove this column" disabled=${state.value.columns.length < 2}
          onClick=${() => (stopAll([one]), configure(state.value.columns.filter((other) => other.id !== one.id)))} />
        ${models.length > 1 &&
        html`<select class="input of-model" aria-label="Model" value=${name} onChange=${(event) => editColumn(one.id, { model: event.target.value })}>
          ${models.map((model) => html`<option value=${model.id} selected=${model.id === name}>${model.id}</option>`)}</select>`}
      </div>
      <p class="help">${words(one.settings) || "the model's own settings"}</p>
    </header>
    <div class="column-body" aria-live="off" tabindex="0" role="group" aria-label="Reply">
      ${reply?.reasoning && html`<details class="reasoning"><summary>Reasoning</summary><${Markdown} text=${reply.reasoning} growing=${busy} /></details>`}
      ${reply && html`<${Markdown} text=${reply.content} growing=${busy} />`}
      ${busy && !reply.content && html`<p class="waiting"><span class="dots"><i></i><i></i><i></i></span></p>`}
      ${reply?.error && html`<div class="ending error" role="alert"><p>${reply.error}</p></div>`}
    </div>
    <footer>
      <${Figures} figures=${reply?.stats} />
      ${reply?.tokens.length > 0 && !busy && html`<span class="figures" title="exp of the mean surprise of its tokens">perplexity ${perplexity(reply.tokens).toFixed(2)}</span>`}
      <span class="actions">${busy
        ? html`<button type="button" class="button small" onClick=${() => reply.controller.abort()}>Stop</button>`
        : reply && html`<${IconButton} icon="retry" label="Again" onClick=${() => answerAll(prompt, one.id)} />
          <${IconButton} icon="chat" label="Continue as a conversation" onClick=${() => toConversation(one, prompt)} />`}</span>
    </footer>
  </section>`;
}

function ColumnSettings({ one, onClose }) {
  const set = (name, value) => {
    const current = state.value.columns.find((other) => other.id === one.id);
    const settings = { ...current.settings, [name]: value };
    if (value === undefined) delete settings[name];
    editColumn(one.id, { settings, strategy: "Own settings" });
  };
  return html`<${Dialog} title="Settings of this column" onClose=${onClose} name="wide">
    <${SettingsForm} values=${one.settings} onChange=${set} idPrefix=${`column-${one.id}`} />
    <div class="dialog-actions"><button type="button" class="button primary" onClick=${onClose}>Done</button></div>
  </${Dialog}>`;
}

export function CompareView() {
  const { prompt, columns } = useSignal(state);
  const { models } = useSignal(server);
  const [settingsOf, setSettingsOf] = useState(null);
  const busy = columns.some((one) => one.reply?.controller);
  const edited = columns.find((one) => one.id === settingsOf);
  const unused = Object.keys(STRATEGIES).find((name) => !columns.some((one) => one.strategy === name));
  return html`<main class="compare" id="main"><h1 class="visually-hidden">Side by side</h1>
    <div class="compare-head">${prompt
      ? html`<div class="said">${prompt}</div>`
      : html`<p class="help">One prompt, up to four answers at once. Each column has its own strategy, settings and model; the engine runs them in one batch.</p>`}</div>
    <div class="columns" data-count=${columns.length}>
      ${columns.map((one) => html`<${Column} key=${one.id} one=${one} prompt=${prompt} models=${models} onSettings=${setSettingsOf} />`)}
      ${columns.length < MOST && html`<button type="button" class="add-column" onClick=${() => configure([...columns, column(unused ?? "Sampling")])}>
        <${Icon} name="plus" /><span>Add a column</span></button>`}
    </div>
    <div class="composer-place">
      <${Composer} draftKey="compare" busy=${busy} onSend=${(content, attachments) => answerAll(promptOf({ content, attachments }))}
        onStop=${() => stopAll(columns)} used=${0} context=${contextOf(defaultModel())} placeholder="One prompt for all columns" />
    </div>
    ${edited && html`<${ColumnSettings} key=${edited.id} one=${edited} onClose=${() => setSettingsOf(null)} />`}
  </main>`;
}

// The frame: conversations at the left, the present view, settings at the right; routes and shortcuts.
import * as chats from "../chats.js";
import { announcement, classes, html, useEffect, useSignal, useState } from "../dom.js";
import { running, stop } from "../replies.js";
import { connect, contextOf, prefer, preferences, server } from "../settings.js";
import { shownPath } from "../tree.js";
import { CompareView } from "./compare.js";
import { ConversationView } from "./conversation.js";
import { Dialogs, shortcutsShown } from "./dialogs.js";
import { EngineView } from "./engine.js";
import { IconButton } from "./icons.js";
import { SettingsPanel } from "./panel.js";
import { Sidebar, exportFile } from "./sidebar.js";

const narrow = matchMedia("(max-width: 800px)");

function routeOf(hash) {
  const [, view = "", id = ""] = hash.split("/");
  return view === "compare" || view === "engine" ? { view } : { view: "chat", id };
}

export function newConversation() {
  const { model, settings } = preferences.value;
  const models = server.value.models.map((one) => one.id);
  chats.openNew({ model: models.includes(model) ? model : (models[0] ?? ""), settings: { ...settings } });
  if (location.hash !== "#/") location.hash = "#/";
}

function ModelPicker({ conversation }) {
  const { models } = useSignal(server);
  const { model } = conversation.record;
  const choose = (event) => {
    chats.edit(conversation, { model: event.target.value });
    prefer({ model: event.target.value });
  };
  const context = contextOf(model);
  const gone = model && models.length > 0 && !models.some((one) => one.id === model);
  return html`<label class="model-picker"><span class="visually-hidden">Model</span>
    <select value=${model} onChange=${choose} title=${context ? `Context: ${context.toLocaleString("en")} tokens` : undefined}>
      ${gone && html`<option value=${model} selected>${model} (not offered now)</option>`}
      ${models.map((one) => html`<option value=${one.id} selected=${one.id === model}>${one.id}</option>`)}
    </select></label>`;
}

export function App() {
  const conversation = useSignal(chats.open);
  const { sidebar } = useSignal(preferences);
  const { problem, locked, models } = useSignal(server);
  const said = useSignal(announcement);
  const [route, setRoute] = useState(routeOf(location.hash));
  const [panel, setPanel] = useState(false);
  const [drawer, setDrawer] = useState(false); // the conversations over a narrow window
  const [, resized] = useState(0);
  useEffect(() => {
    const redraw = () => resized((n) => n + 1);
    narrow.addEventListener("change", redraw);
    return () => narrow.removeEventListener("change", redraw);
  }, []);

  useEffect(() => {
    const follow = async () => {
      const next = routeOf(location.hash);
      setRoute(next);
      setDrawer(false);
      if (next.view !== "chat") setPanel(false);
      if (next.view === "chat" && next.id && chats.open.value.record.id !== next.id && !(await chats.openConversation(next.id))) newConversation();
      else if (next.view === "chat" && !next.id && chats.open.value.nodes.size > 1) newConversation();
    };
    window.addEventListener("hashchange", follow);
    follow();
    return () => window.removeEventListener("hashchange", follow);
  }, []);
  useEffect(() => {
    // A conversation gets its address with its first message, or when it is opened by other means than its address.
    const address = `#/chat/${conversation.record.id}`;
    if (conversation.nodes.size > 1 && routeOf(location.hash).view === "chat" && location.hash !== address) location.hash = address;
  }, [conversation, conversation.nodes.size > 1]);
  useEffect(() => {
    const names = { compare: "Side by side", engine: "The engine" };
    document.title = `${names[route.view] ?? (conversation.record.title || "New conversation")} · Mnemos`;
  });
  useEffect(() => {
    // The list of models came, or changed: a conversation without one takes the first.
    if (!conversation.record.model && models.length) {
      const { model } = preferences.value;
      chats.edit(conversation, { model: models.some((one) => one.id === model) ? model : models[0].id });
    }
  }, [conversation, models]);

  const toggleSidebar = () => (narrow.matches ? setDrawer(!drawer) : prefer({ sidebar: !sidebar }));
  const togglePanel = () => {
    setDrawer(false);
    setPanel(!panel);
  };
  useEffect(() => {
    const keys = (event) => {
      const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
      const control = event.ctrlKey || event.metaKey;
      const letter = event.key.toLowerCase();
      if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
      if (event.key === "Escape") {
        if (drawer) setDrawer(false);
        else if (!stopShown() && typing) typing.blur();
      } else if (control && event.shiftKey && letter === "o") newConversation();
      else if (control && !event.shiftKey && letter === "k") search();
      else if (control && !event.shiftKey && letter === "b") toggleSidebar();
      else if (control && event.key === ",") togglePanel();
      else if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) goToMessage(event.key === "ArrowUp" ? -1 : 1);
      else if (!typing && !control && !event.altKey && event.key === "/") document.getElementById("composer")?.focus();
      else if (!typing && !control && !event.altKey && event.key === "?") shortcutsShown.value = true;
      else return;
      event.preventDefault();
    };
    const search = () => {
      const field = document.getElementById("search");
      if (field) return field.focus();
      if (narrow.matches) setDrawer(true);
      else prefer({ sidebar: true });
      return setTimeout(() => document.getElementById("search")?.focus(), 50); // once it is drawn
    };
    document.addEventListener("keydown", keys);
    return () => document.removeEventListener("keydown", keys);
  });

  const chat = route.view === "chat";
  const shown = narrow.matches ? drawer : sidebar;
  const titles = { compare: "Side by side", engine: "The engine" };
  return html`<div class=${classes("app", shown && "with-sidebar", panel && chat && "with-panel")}>
    <a class="skip" href="#main" onClick=${skip}>To the content</a>
    ${shown && html`<${Sidebar} route=${route} onNew=${newConversation} onHide=${toggleSidebar} />`}
    ${drawer && html`<div class="veil" onClick=${() => setDrawer(false)}></div>`}
    <div class="middle">
      <header class="top">
        ${!shown && html`<${IconButton} icon="menu" label="Show the conversations" shortcut="Ctrl+B" onClick=${toggleSidebar} />`}
        ${chat ? html`<${ModelPicker} conversation=${conversation} />` : html`<strong class="view-title">${titles[route.view]}</strong>`}
        <span class="conversation-title">${chat ? conversation.record.title : ""}</span>
        ${chat && conversation.nodes.size > 1 && html`<${IconButton} icon="save" label="Export this conversation" onClick=${() => exportFile([conversation.record.id], conversation.record.title)} />`}
        <${IconButton} icon="plus" label="New conversation" shortcut="Ctrl+Shift+O" class="narrow-only" onClick=${newConversation} />
        ${chat && html`<${IconButton} icon="sliders" label="Settings" shortcut="Ctrl+," aria-expanded=${panel ? "true" : "false"} onClick=${togglePanel} />`}
      </header>
      ${problem &&
      html`<div class="banner" role="alert">${locked
        ? html`${problem} <button type="button" class="button small" onClick=${connect}>Enter the key</button>`
        : html`<span class="pulse">${problem} Trying again …</span>`}</div>`}
      ${chat ? html`<${ConversationView} />` : route.view === "compare" ? html`<${CompareView} />` : html`<${EngineView} />`}
    </div>
    ${panel && chat && html`<${SettingsPanel} key=${conversation.record.id} onClose=${() => setPanel(false)} />`}
    <${Dialogs} />
    <div class="visually-hidden" role="status" aria-live="polite">${said}</div>
  </div>`;
}

function skip(event) {
  event.preventDefault();
  const main = document.getElementById("main");
  main.tabIndex = -1;
  main.focus();
}

/** Stops the replies of the shown path; true if there were any. */
function stopShown() {
  const { nodes, record } = chats.open.value;
  const shown = shownPath(nodes, record.id).filter((node) => running.value.has(node.id));
  shown.forEach((node) => stop(node.id));
  return shown.length > 0;
}

function goToMessage(step) {
  const messages = [...document.querySelectorAll(".message")];
  const here = messages.indexOf(document.activeElement?.closest(".message"));
  const next = here < 0 ? (step < 0 ? messages.length - 1 : 0) : here + step;
  if (messages[next]) messages[next].focus();
  else if (next >= messages.length) document.getElementById("composer")?.focus();
}

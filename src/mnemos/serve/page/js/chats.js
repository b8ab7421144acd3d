// The conversations: the list of all, the open one, and every change to them. The browser's database follows.
import * as database from "./database.js";
import { Signal, newId } from "./dom.js";
import * as tree from "./tree.js";

/** {id, title, created, updated}, the latest first. */
export const list = new Signal([]);
/** The open conversation: its record and `nodes`, the tree; null before the first is opened. */
export const open = new Signal(null);
/** The ids of the replies that are shown token by token. */
export const inside = new Signal(new Set());
/** Why nothing is kept; empty if it is. */
export const storageProblem = new Signal("");

const loaded = new Map(); // conversations with a reply in progress stay here while another one is open
const tokensInMemory = new Map(); // by message; those of the others are in the database

function keep(work) {
  return work.catch((error) => {
    storageProblem.value = `This browser keeps no history (${error?.message ?? error}). Export what you want to keep.`;
  });
}

export async function start() {
  try {
    list.value = (await database.allConversations()).sort((a, b) => b.updated - a.updated);
  } catch (error) {
    storageProblem.value = `This browser keeps no history (${error?.message ?? error}).`;
  }
}

export function newConversation(fields = {}) {
  const id = newId();
  const now = Date.now();
  const record = { id, title: "", system: "", model: "", settings: {}, created: now, updated: now, ...fields };
  return { record, nodes: tree.newTree(id) };
}

/** Opens an empty conversation, which is kept once it has a message. */
export function openNew(fields) {
  open.value = newConversation(fields);
}

export async function openConversation(id) {
  const found = loaded.get(id) ?? (await read(id));
  if (found) open.value = found;
  return Boolean(found);
}

async function read(id) {
  const record = await database.conversation(id);
  if (!record) return null;
  const nodes = tree.newTree(id);
  for (const message of await database.messagesOf(id)) nodes.set(message.id, settled(message));
  return { record, nodes };
}

/** A message as it was stored; a reply that was still being written then was interrupted. */
function settled(message) {
  if (message.role !== "assistant" || message.finish || message.error) return message;
  return { ...message, error: { message: "The page was closed before the reply was complete.", connection: true } };
}

/** Holds a conversation in memory while something writes to it. */
export function hold(conversation) {
  loaded.set(conversation.record.id, conversation);
}

export function release(conversation) {
  loaded.delete(conversation.record.id);
}

function stored(conversation, nodes) {
  return nodes.map(({ live, waiting, ...node }) => ({ ...node, conversation: conversation.record.id }));
}

function redraw(conversation, calm = false) {
  if (open.value === conversation) open.changed({ calm });
}

function showInList(record) {
  const { id, title, created, updated } = record;
  const others = list.value.filter((other) => other.id !== id);
  list.value = [{ id, title, created, updated }, ...others].sort((a, b) => b.updated - a.updated);
}

/** Saves changed messages; `touched` moves the conversation to the top of the list. */
export function save(conversation, nodes, touched = false) {
  const { record } = conversation;
  if (touched) {
    record.updated = Date.now();
    showInList(record);
  }
  redraw(conversation);
  return keep(database.saveMessages(stored(conversation, nodes), touched ? record : null));
}

/** Changes a message in memory alone, as for every token; `save` follows. */
export function change(conversation, id, fields) {
  const node = tree.changeNode(conversation.nodes, id, fields);
  redraw(conversation, true);
  return node;
}

export function add(conversation, fields) {
  const node = { id: newId(), created: Date.now(), content: "", ...fields };
  const changed = tree.addNode(conversation.nodes, node);
  const { record } = conversation;
  if (!record.title && node.role === "user") record.title = titleOf(node);
  save(conversation, changed, true);
  return conversation.nodes.get(node.id);
}

function titleOf(node) {
  const line = node.content.trim().split("\n")[0] || node.attachments?.[0]?.name || "Conversation";
  return line.length > 60 ? `${line.slice(0, 59).replace(/[\s.,;:]+$/, "")}…` : line;
}

export function showSibling(conversation, id, step) {
  save(conversation, [tree.showSibling(conversation.nodes, id, step)]);
}

export function remove(conversation, id) {
  const { changed, removed } = tree.removeNode(conversation.nodes, id);
  save(conversation, [changed], true);
  return keep(database.deleteMessages(removed));
}

/** Changes the record: title, system message, model or settings. One without messages is not stored yet. */
export function edit(conversation, fields) {
  Object.assign(conversation.record, fields);
  redraw(conversation);
  if (conversation.nodes.size === 1) return;
  if ("title" in fields) showInList(conversation.record);
  keep(database.saveConversation(conversation.record));
}

export async function rename(id, title) {
  if (open.value?.record.id === id) return edit(open.value, { title });
  const record = loaded.get(id)?.record ?? (await database.conversation(id));
  record.title = title;
  showInList(record);
  keep(database.saveConversation(record));
}

export async function removeConversation(id) {
  list.value = list.value.filter((other) => other.id !== id);
  await keep(database.deleteConversation(id));
}

/** Copies the messages up to this one into a conversation of its own, and opens it. */
export async function fork(conversation, id) {
  const { system, model, settings, title } = conversation.record;
  const copy = newConversation({ system, model, settings: { ...settings }, title: `${title} (fork)` });
  let parent = copy.record.id;
  for (const node of tree.pathTo(conversation.nodes, id)) {
    const own = { ...node, id: newId(), parent, children: [], selected: null };
    tree.addNode(copy.nodes, own);
    const tokens = await tokensOf(node.id);
    if (tokens.length) setTokens(own.id, tokens, true);
    parent = own.id;
  }
  await save(copy, [...copy.nodes.values()], true);
  open.value = copy;
}

export async function tokensOf(id) {
  return tokensInMemory.get(id) ?? (await database.tokensOf(id).catch(() => []));
}

export function tokensNow(id) {
  return tokensInMemory.get(id);
}

/** Holds a message's tokens while they grow; `done` moves them to the database. */
export function setTokens(id, tokens, done) {
  tokensInMemory.set(id, tokens);
  if (done) keep(database.saveTokens(id, tokens).then(() => tokensInMemory.delete(id)));
}

/** The ids of the conversations whose title or messages contain the text. */
export async function search(text) {
  const wanted = text.trim().toLowerCase();
  const found = new Set(list.value.filter((one) => one.title.toLowerCase().includes(wanted)).map((one) => one.id));
  for (const message of await database.allMessages().catch(() => [])) {
    if (message.content?.toLowerCase().includes(wanted)) found.add(message.conversation);
  }
  return found;
}

export function lookInside(id, on) {
  if (on) inside.value.add(id);
  else inside.value.delete(id);
  inside.changed();
}

const FORMAT = "mnemos-conversations";

/** Conversations with their whole trees as JSON text: all of them, or those of these ids. */
export async function exported(ids = null) {
  const conversations = [];
  for (const record of await database.allConversations()) {
    if (ids && !ids.includes(record.id)) continue;
    const messages = await database.messagesOf(record.id);
    for (const message of messages) {
      const tokens = await tokensOf(message.id);
      if (tokens.length) message.tokens = tokens;
    }
    conversations.push({ ...record, messages });
  }
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations });
}

/** Adds the conversations of an exported file; one that is here already is replaced. Returns their number. */
export async function imported(text) {
  let file = null;
  try {
    file = JSON.parse(text);
  } catch {
    // The check below says what the file should be.
  }
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) {
    throw new Error("This is not a file of conversations that this page exported.");
  }
  for (const { messages, ...record } of file.conversations) checkTree(record, messages);
  for (const { messages, ...record } of file.conversations) {
    await database.deleteConversation(record.id);
    const own = messages.map(({ tokens, ...message }) => ({ ...message, conversation: record.id }));
    await database.saveMessages(own, record);
    for (const { id, tokens } of messages) if (tokens) await database.saveTokens(id, tokens);
  }
  await start();
  const now = file.conversations.find((one) => one.id === open.value.record.id);
  if (now) open.value = await read(now.id);
  return file.conversations.length;
}

/** Every message must hang on the tree, or a conversation could not be drawn. */
function checkTree(record, messages) {
  const nodes = new Map(Array.isArray(messages) ? messages.map((message) => [message.id, message]) : []);
  const whole =
    typeof record.id === "string" &&
    nodes.has(record.id) &&
    [...nodes.values()].every(
      (node) =>
        Array.isArray(node.children) &&
        node.children.every((child) => nodes.get(child)?.parent === node.id) &&
        (node.selected === null || node.children.includes(node.selected)) &&
        (node.tokens === undefined || Array.isArray(node.tokens)) &&
        (node.id === record.id || (typeof node.content === "string" && nodes.get(node.parent)?.children?.includes(node.id))),
    );
  if (!whole) throw new Error(`The conversation “${record.title}” of this file is damaged; nothing was imported.`);
}

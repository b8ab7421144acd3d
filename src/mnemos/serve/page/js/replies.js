// Replies: one streamed request each, which fills a message as its text arrives. Whatever ends it, its text is kept.
import { ApiError, engineLive, streamChat } from "./api.js";
import * as chats from "./chats.js";
import { Signal, announce } from "./dom.js";
import { contextOf, preferences, refreshModels } from "./settings.js";
import { isSpecial, readTokens, textOf } from "./tokens.js";
import { pathTo } from "./tree.js";

const SAVE_EVERY = 1000; // ms
const ALTERNATIVES = 8;
const LONGEST = 1 << 24; // tokens; the end of the context comes first

/** Replies in progress: an AbortController for each message's id. */
export const running = new Signal(new Map());

export function stop(id) {
  running.value.get(id)?.abort();
}

/** Measures a stream: time to first token, tokens, tokens per second. */
export class Stopwatch {
  constructor() {
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
    this.usage = null;
  }

  count(tokens) {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += tokens;
  }

  get figures() {
    const generated = this.usage?.completion_tokens ?? this.tokens;
    // A search gives its text at once when it is found: its speed is that of the whole reply.
    const [whole, afterFirst] = [this.last - this.started, this.last - this.first].map((ms) => ms / 1000);
    const seconds = afterFirst > whole / 10 ? afterFirst : whole;
    return {
      firstToken: this.first === null ? null : (this.first - this.started) / 1000,
      tokens: generated,
      rate: generated > 1 && seconds > 0 ? (generated - 1) / seconds : null,
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      total: this.usage?.total_tokens ?? null,
    };
  }
}

/** A user's message as the model reads it: the attached files first. */
export function promptOf(node) {
  const files = (node.attachments ?? []).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length + 1)));
    return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...files, node.content].filter(Boolean).join("\n\n");
}

function messagesFor(record, path) {
  const messages = record.system.trim() ? [{ role: "system", content: record.system }] : [];
  for (const node of path) {
    if (node.role === "user") messages.push({ role: "user", content: promptOf(node) });
    else if (node.content) messages.push({ role: "assistant", content: node.content });
  }
  return messages;
}

/** The fields of a request that the message's conversation asks for. */
export function requestFields(model, settings) {
  const inside = preferences.value.inside ? { logprobs: true, top_logprobs: ALTERNATIVES } : {};
  const limited = "max_new_tokens" in settings || "max_length" in settings;
  return { model: model || undefined, ...(!limited && { max_length: LONGEST }), ...inside, ...settings };
}

/** Sends what the user wrote and answers it. */
export function sendMessage(conversation, parent, fields) {
  const node = chats.add(conversation, { parent, role: "user", ...fields });
  return answer(conversation, node.id);
}

/** A new reply to a user's message, as a branch beside those that are there. */
export function answer(conversation, userId) {
  const node = chats.add(conversation, { parent: userId, role: "assistant", model: conversation.record.model });
  return run(conversation, node.id, pathTo(conversation.nodes, userId), false);
}

/** Goes on where a reply stopped, in the same message. */
export function continueReply(conversation, id) {
  chats.change(conversation, id, { error: null, finish: null });
  return run(conversation, id, pathTo(conversation.nodes, id), true);
}

/** A branch that begins with the reply's tokens before `index` and the alternative, and goes on from there. */
export async function goOnWith(conversation, id, index, alternative) {
  const before = (await chats.tokensOf(id)).slice(0, index);
  const tokens = [...before, { ...alternative, a: (await chats.tokensOf(id))[index].a, f: true }];
  const { parent, model } = conversation.nodes.get(id);
  const ends = isSpecial(alternative.t);
  const content = textOf(ends ? before : tokens);
  const node = chats.add(conversation, { parent, role: "assistant", model, content, finish: ends ? "stop" : null });
  chats.setTokens(node.id, tokens, true);
  chats.lookInside(node.id, true);
  if (ends) return undefined;
  return run(conversation, node.id, pathTo(conversation.nodes, node.id), true, tokens);
}

/** Tries a reply that failed once more: in place if nothing of it is there, else as a branch. */
export function retry(conversation, id) {
  const node = conversation.nodes.get(id);
  if (node.content || node.reasoning) return answer(conversation, node.parent);
  chats.change(conversation, id, { error: null, finish: null });
  return run(conversation, id, pathTo(conversation.nodes, node.parent), false);
}

async function run(conversation, id, path, goingOn, given = null) {
  const { record, nodes } = conversation;
  const controller = new AbortController();
  const { signal } = controller;
  running.value.set(id, controller);
  running.changed();
  chats.hold(conversation);
  announce("Reply started");

  const start = nodes.get(id);
  const tokens = [...(given ?? (goingOn ? await chats.tokensOf(id) : []))];
  const watch = new Stopwatch();
  let { content = "", reasoning = "" } = start;
  let finish = null;
  let error = null;
  let saved = performance.now();
  explainWaiting(conversation, id, watch, signal);
  try {
    const body = {
      ...requestFields(start.model || record.model, record.settings),
      messages: messagesFor(record, path),
      ...(goingOn && { continue_final_message: true, add_generation_prompt: false }),
    };
    for await (const chunk of streamChat(body, signal)) {
      if (chunk.usage) watch.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const delta = choice.delta ?? {};
      const added = choice.logprobs?.content ?? [];
      if (added.length) tokens.push(...readTokens(added));
      if (delta.content || delta.reasoning_content || added.length) watch.count(added.length || 1);
      content += delta.content ?? "";
      reasoning += delta.reasoning_content ?? "";
      finish = choice.finish_reason ?? finish;
      chats.setTokens(id, tokens, false);
      chats.change(conversation, id, { content, reasoning, waiting: null, live: watch.figures });
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        chats.save(conversation, [nodes.get(id)]);
      }
    }
  } catch (caught) {
    if (signal.aborted) finish = "stopped";
    else error = { message: caught.message, connection: caught instanceof ApiError && caught.connection };
  }
  const stats = watch.first === null ? (start.stats ?? null) : watch.figures;
  controller.abort(); // ends the look at the engine
  running.value.delete(id);
  running.changed();
  if (!error && !contextOf(start.model)) refreshModels().catch(() => {});
  if (!nodes.has(id)) return; // deleted meanwhile
  const node = chats.change(conversation, id, { content, reasoning, finish, error, stats, waiting: null, live: null });
  if (tokens.length) chats.setTokens(id, tokens, true);
  await chats.save(conversation, [node], true);
  if (![...running.value.keys()].some((other) => nodes.has(other))) chats.release(conversation);
  announce(error ? `The reply failed: ${error.message}` : `Reply ${finish === "stopped" ? "stopped" : "complete"}: ${content}`);
}

/** Says what is happening before the first token, once that takes a second. */
async function explainWaiting(conversation, id, watch, signal) {
  await new Promise((resolve) => setTimeout(resolve, 1000));
  if (watch.first !== null || signal.aborted) return;
  const looking = new AbortController();
  signal.addEventListener("abort", () => looking.abort());
  const name = conversation.nodes.get(id).model;
  try {
    for await (const { models } of engineLive(looking.signal)) {
      if (watch.first !== null || !conversation.nodes.has(id)) break;
      const model = models.find((one) => one.id === name) ?? models[0];
      const waiting = !model?.loaded ? "Loading the model" : model.waiting ? "Waiting for a place" : "Reading the prompt";
      if (conversation.nodes.get(id).waiting !== waiting) chats.change(conversation, id, { waiting });
    }
  } catch {
    // Only the explanation is missing then.
  }
  looking.abort();
}

// The engine: what it is doing, live, so that batching can be seen.
import { engineLive, send } from "../api.js";
import { Signal, html, useEffect, useSignal, useState } from "../dom.js";
import { preferences, server } from "../settings.js";
import { Chart } from "./charts.js";

const KEPT = 240; // samples: two minutes

/** {problem, models: Map from ids to {now, rates}} */
const live = new Signal({ problem: "", models: new Map() });

async function watch(signal) {
  while (!signal.aborted) {
    try {
      for await (const sample of engineLive(signal)) take(sample);
    } catch (error) {
      if (signal.aborted) return;
      live.value = { ...live.value, problem: error.message };
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function take({ models }) {
  const at = performance.now();
  const known = live.value.models;
  for (const now of models) {
    const { at: before, now: last, history = [] } = known.get(now.id) ?? {};
    const seconds = (at - before) / 1000;
    if (!now.loaded) {
      known.set(now.id, { at, now, history: [] });
      continue;
    }
    // The first sample has nothing to be compared with, and neither has one after a reload of the model.
    const per = (name) => (last && seconds > 0 && now[name] >= last[name] ? (now[name] - last[name]) / seconds : 0);
    const point = { ...now, generatedRate: per("generated_tokens"), promptRate: per("prompt_tokens") };
    known.set(now.id, { at, now, history: [...history, point].slice(-KEPT) });
  }
  live.value = { problem: "", models: known };
}

const SUBJECTS = ["the moon", "bread", "an echo", "winter", "a library", "the tide", "a bridge", "dust"];

/** Several prompts in one request, since a browser opens only six connections to a server; the charts show the rest. */
async function load(model) {
  const prompt = SUBJECTS.map((subject) => `A few lines about ${subject}:\n\n`);
  try {
    await send("v1/completions", { body: { model, prompt, max_tokens: 128, temperature: 0.8 } });
    return "";
  } catch (error) {
    return error.message;
  }
}

const seconds = (value) => (value === null || value === undefined ? "–" : value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);

function Figure({ name, value, note }) {
  return html`<div class="figure"><dt>${name}</dt><dd>${value}${note && html` <small>${note}</small>`}</dd></div>`;
}

function Pages({ now }) {
  const share = (n) => ({ width: `${now.pages_total ? (100 * n) / now.pages_total : 0}%` });
  const text = `${now.pages_used.toLocaleString("en")} in use, ${now.pages_cached.toLocaleString("en")} cached, of ${now.pages_total.toLocaleString("en")}`;
  return html`<div class="pages"><div class="pages-head"><strong>Pages of the key/value cache</strong><span>${text}</span></div>
    <div class="pages-bar" role="img" aria-label=${text}><span class="used" style=${share(now.pages_used)}></span><span class="cached" style=${share(now.pages_cached)}></span></div></div>`;
}

function ModelSection({ id, entry }) {
  const { now, history } = entry;
  if (!now.loaded) return html`<section class="engine-model" aria-label=${id}><header><h2>${id}</h2><span class="state">not loaded</span></header></section>`;
  return html`<${LoadedModel} id=${id} now=${now} history=${history} />`;
}

function LoadedModel({ id, now, history }) {
  const [sent, setSent] = useState(false);
  const [refused, setRefused] = useState("");
  const values = (name) => history.map((point) => point[name] ?? 0);
  const start = async () => {
    setSent(true);
    setRefused(await load(id));
    setSent(false);
  };
  const point = history[history.length - 1];
  const first = now.time_to_first_token;
  const between = now.inter_token_latency;
  return html`<section class="engine-model" aria-label=${id}>
    <header><h2>${id}</h2><span class="state on">${now.running ? "working" : "idle"}</span>
      <button type="button" class="button" disabled=${sent} onClick=${start}>Send ${SUBJECTS.length} requests at once</button></header>
    ${refused && html`<p class="ending error" role="alert">${refused}</p>`}
    <dl class="figures-grid">
      <${Figure} name="Running" value=${now.running} note=${now.waiting ? `+ ${now.waiting} waiting` : ""} />
      <${Figure} name="Tokens/s" value=${point.generatedRate.toFixed(point.generatedRate < 10 ? 1 : 0)} note=${now.running > 1 ? `${(point.generatedRate / now.running).toFixed(1)} each` : ""} />
      <${Figure} name="First token" value=${seconds(first.median)} note=${first.p99 ? `p99 ${seconds(first.p99)}` : ""} />
      <${Figure} name="Between tokens" value=${seconds(between.median)} note=${between.p99 ? `p99 ${seconds(between.p99)}` : ""} />
      <${Figure} name="Prefix hits" value=${`${Math.round(100 * (now.prefix_hit_rate ?? 0))}%`} note="of prompt tokens" />
      <${Figure} name="Generated" value=${now.generated_tokens.toLocaleString("en")} note="tokens" />
    </dl>
    <${Pages} now=${now} />
    <div class="charts">
      <${Chart} title="Requests" count=${KEPT} series=${[{ name: "running", values: values("running"), area: true }, { name: "waiting", values: values("waiting") }]} />
      <${Chart} title="Tokens per second" count=${KEPT} series=${[{ name: "generated", values: values("generatedRate"), area: true }, { name: "read", values: values("promptRate") }]} />
      <${Chart} title="Pages" count=${KEPT} top=${now.pages_total || 1} series=${[{ name: "in use", values: values("pages_used"), area: true }, { name: "cached", values: values("pages_cached") }]} />
      <${Chart} title="Prefix hits" count=${KEPT} top=${100} unit="%" series=${[{ name: "of prompt tokens", values: values("prefix_hit_rate").map((rate) => 100 * rate), area: true }]} />
    </div>
  </section>`;
}

export function EngineView() {
  const { problem, models } = useSignal(live);
  const { models: offered } = useSignal(server);
  useEffect(() => {
    const controller = new AbortController();
    watch(controller.signal);
    return () => controller.abort();
  }, []);
  const first = preferences.value.model || offered[0]?.id;
  const sorted = [...models].sort(([a, x], [b, y]) => y.now.loaded - x.now.loaded || (b === first) - (a === first));
  return html`<main class="engine" id="main"><div class="engine-inner">
    <h1 class="visually-hidden">The engine</h1>
    <p class="help">Requests that run at the same time are rows of one batch: each token's weights are read once for all of them. The last two minutes.</p>
    ${problem && html`<p class="ending error" role="alert">${problem}</p>`}
    ${!sorted.length && !problem && html`<p class="help">Waiting for the first figures …</p>`}
    ${sorted.map(([id, entry]) => html`<${ModelSection} key=${id} id=${id} entry=${entry} />`)}
  </div></main>`;
}

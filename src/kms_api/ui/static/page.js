// Live progress of jobs, over server-sent events. Without this script the pages say the same when loaded.
"use strict";

const MOST = 4; // a browser opens six connections to a host over HTTP/1.1, and the reader wants one, too
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const news = document.getElementById("news");

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return unit ? `${bytes.toFixed(1)} ${UNITS[unit]}` : `${bytes} B`;
}

function amount(progress) { // as ui/filters.py
  if (!progress.items) return `${size(progress.bytes_done)} of ${size(progress.bytes)}`;
  const number = (count) => count.toLocaleString("en");
  const refused = progress.items_failed ? `, ${number(progress.items_failed)} refused` : "";
  return `${number(progress.items_done)} of ${number(progress.items)} items${refused}`;
}

function follow(place) {
  const source = new EventSource(place.dataset.events);
  const state = place.querySelector(".state");
  const bar = place.querySelector("progress");
  let told = `${state.textContent} 0`;

  source.addEventListener("progress", (event) => {
    const job = JSON.parse(event.data);
    const done = job.progress.items ? job.progress.items_done : job.progress.bytes_done;
    const whole = job.progress.items || job.progress.bytes;
    state.textContent = job.state;
    state.dataset.state = job.state;
    place.querySelector(".amount").textContent = amount(job.progress);
    if (bar && whole) {
      bar.max = whole;
      bar.value = done;
    }
    const quarter = whole ? Math.floor((4 * done) / whole) : 0;
    const tell = `${job.state} ${quarter}`;
    if (tell !== told) { // a screen reader hears of states and quarters, not of every item
      told = tell;
      news.textContent = `Job ${place.dataset.job}: ${job.state}, ${amount(job.progress)}`;
    }
    if (ENDED.has(job.state)) {
      source.close();
      if ("reload" in place.dataset) location.replace(location.pathname);
      else next();
    }
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) next();
  });
  addEventListener("pagehide", () => source.close());
}

const waiting = Array.from(document.querySelectorAll("[data-events]"));

function next() {
  const place = waiting.shift();
  if (place) follow(place);
}

for (let count = 0; count < MOST; count += 1) next();

// Live progress of jobs by server-sent events. Without this script, pages show the same when reloaded.
"use strict";

const MAX_STREAMS = 4; // browsers open six HTTP/1.1 connections to a host, and page loads need some
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

function amount(progress) { // as ui/render.py
  if (!progress.items) return `${size(progress.bytes_done)} of ${size(progress.bytes)}`;
  const number = (count) => count.toLocaleString("en");
  const refused = progress.items_failed ? `, ${number(progress.items_failed)} refused` : "";
  return `${number(progress.items_done)} of ${number(progress.items)} items${refused}`;
}

function follow(element) {
  const source = new EventSource(element.dataset.events);
  const state = element.querySelector(".state");
  const bar = element.querySelector("progress");
  let announced = `${state.textContent} 0`;

  source.addEventListener("progress", (event) => {
    const job = JSON.parse(event.data);
    const done = job.progress.items ? job.progress.items_done - job.progress.items_failed : job.progress.bytes_done;
    const total = job.progress.items || job.progress.bytes;
    state.textContent = job.state;
    state.dataset.state = job.state;
    element.dataset.state = job.state;
    element.querySelector(".amount").textContent = amount(job.progress);
    if (bar && total) {
      bar.max = total;
      bar.value = done;
    }
    const quarter = total ? Math.floor((4 * done) / total) : 0;
    const announcement = `${job.state} ${quarter}`;
    if (announcement !== announced) { // screen readers read states and quarters, not each item
      announced = announcement;
      news.textContent = `Job ${element.dataset.job}: ${job.state}, ${amount(job.progress)}`;
    }
    if (ENDED.has(job.state)) {
      source.close();
      if ("reload" in element.dataset) location.replace(location.pathname);
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
  const element = waiting.shift();
  if (element) follow(element);
}

for (let count = 0; count < MAX_STREAMS; count += 1) next();

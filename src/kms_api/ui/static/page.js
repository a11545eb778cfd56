// Live progress of jobs by long polls. Without this script, pages show the same when reloaded.
"use strict";

const AT_ONCE = 4; // browsers open six HTTP/1.1 connections to a host, and page loads need some
const WAIT_S = 2; // of a poll that finds no end
const PAUSE_S = 5; // after a poll that failed
const PASSING = new Set([429, 502, 503, 504]);
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

// The job, at its end or after WAIT_S; null if the service cannot tell now, undefined if it will not tell.
async function poll(path) {
  try {
    const answer = await fetch(`${path}?wait=${WAIT_S}`, { redirect: "manual" });
    if (answer.ok) return await answer.json();
    return PASSING.has(answer.status) ? null : undefined;
  } catch {
    return null;
  }
}

async function follow(element) {
  const state = element.querySelector(".state");
  const bar = element.querySelector("progress");
  let announced = `${state.textContent} 0`;

  function show(job) {
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
  }

  for (;;) {
    const begun = Date.now();
    const job = await poll(element.dataset.poll);
    if (job === undefined) return;
    if (job) show(job);
    if (job && ENDED.has(job.state)) break;
    const rest = begun + 1000 * (job ? WAIT_S : PAUSE_S) - Date.now(); // an answer may come without a wait
    await new Promise((resume) => setTimeout(resume, rest));
  }
  if ("reload" in element.dataset) location.replace(location.pathname);
}

const waiting = Array.from(document.querySelectorAll("[data-poll]"));

async function next() {
  while (waiting.length) await follow(waiting.shift());
}

for (let count = 0; count < AT_ONCE; count += 1) next();

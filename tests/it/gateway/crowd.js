// A crowd of real socket.io-clients that watch an event, buy its tickets and come back by themselves whatever happens to
// their connections. Driven over stdin, one JSON object a line; everything that a client asks and hears is reported on
// stdout, with this machine's clock in milliseconds.
//
// Commands: {do: "begin", url, event, categories, seed, people: [{user, token, transports, buys}]} · {do: "paid", order}
// (a payment has ended) · {do: "views", id} · {do: "calm"} (buyers give back what they hold and stop) · {do: "check", id}
// (everybody asks for their locks).
// Reports: {ask, user, data, began, ended, answer, why, transport,
// greeted} (no answer: why; connected since) · {on, at, contact, locks} (connected, and when the
// user was heard of last before) · {off, at, contact, reason} · {pay: {user, order, lockId, categoryId, quantity}} ·
// {told, user, data} (a personal message) · {bad} (what must not be) · {views, id} · {calm: user} · {checked: id}
// · {stalled, began, ended} (this process stood still).
import readline from "node:readline";

import { io } from "socket.io-client";

/** From a request to giving up on its answer; far above the service's own limit. */
const PATIENCE_MS = 8000;
/** Between two signs of life of a client that does nothing else. */
const BEAT_MS = 700;
/** How long a buyer insists on an answer. */
const INSIST_MS = 90_000;

/** Answers after which it is not known what happened, or that ask to come again. */
const AGAIN = new Set(["unavailable", "inventory_unavailable", "rate_limited"]);
const PERSONAL = ["lock-expired", "lock-released", "lock-expiring", "order-completed", "order-cancelled"];

const people = new Map();
const payments = new Map();
let isCalm = false;
let state = 1;

function report(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

/** The same numbers for the same seed (mulberry32). */
function random() {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
}

const below = (n) => Math.floor(random() * n);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

class Person {
  constructor({ url, event, categories }, { user, token, transports, buys }) {
    Object.assign(this, { user, event, categories, buys });
    this.isOn = false;
    this.isAway = false;
    this.contact = Date.now();
    this.view = new Map();
    this.connections = 0;
    this.wishes = 0;
    this.waiting = [];
    // Quick for a test, and still the client's own way of coming back; its cookies keep it at one replica.
    this.socket = io(`${url}/realtime`, {
      forceNew: true, auth: { token }, transports, withCredentials: true,
      reconnectionDelay: 100, reconnectionDelayMax: 1000, timeout: 5000,
    });
    this.socket.io.on("open", () => {
      this.socket.io.engine.on("packet", () => {
        if (this.isOn) this.contact = Date.now();
      });
    });
    this.socket.on("connected", (greeting) => this.greeted(greeting));
    this.socket.on("disconnect", (reason) => this.lost(reason));
    this.socket.on("connect_error", (error) => {
      if (this.socket.active) return;
      // Not tried again by itself: a client that is moved must never be told this.
      report({ refused: error.message, user: this.user });
      setTimeout(() => this.socket.connect(), 500);
    });
    this.socket.on("availability-update", (update) => this.note(update));
    for (const name of PERSONAL) {
      this.socket.on(name, (data) => report({ told: name, user: this.user, at: Date.now(), data }));
    }
    setInterval(() => this.isOn && this.ask("heartbeat", null), BEAT_MS);
  }

  greeted({ locks }) {
    report({ on: this.user, at: Date.now() + 1, contact: this.contact, locks });
    this.isOn = true;
    this.contact = this.greetedAt = Date.now();
    this.connections += 1;
    this.view = new Map();
    this.join(this.connections);
    for (const wake of this.waiting.splice(0)) wake();
  }

  lost(reason) {
    if (!this.isOn) return;
    this.isOn = false;
    report({ off: this.user, at: Date.now(), contact: this.contact, reason });
  }

  /** Until it is connected and greeted. */
  connected() {
    return this.isOn ? Promise.resolve() : new Promise((resolve) => this.waiting.push(resolve));
  }

  async join(connection) {
    while (this.isOn && this.connections === connection) {
      const answer = await this.ask("join-event-room", { eventId: this.event });
      if (answer?.success) return;
      await pause(200);
    }
  }

  note(update) {
    const known = this.view.get(update.categoryId);
    if (known && known.version > update.version) {
      report({ bad: `user ${this.user} was told version ${update.version} after ${known.version} of ${update.categoryId}` });
      return;
    }
    this.view.set(update.categoryId, update);
  }

  /** One request and its answer; undefined when there is none. */
  ask(name, data) {
    const began = Date.now();
    const connection = this.connections;
    return new Promise((resolve) => {
      const args = data === null ? [] : [data];
      this.socket.timeout(PATIENCE_MS).emit(name, ...args, (error, answer) => {
        const stayed = this.isOn && this.connections === connection;
        if (error) answer = undefined;
        if (name === "join-event-room" && answer?.success) answer.availability.forEach((counts) => this.note(counts));
        const why = error ? (stayed ? "silence" : "disconnected") : undefined;
        if (name !== "heartbeat" || error || Date.now() - began > 1000) {
          const transport = this.socket.io.engine?.transport?.name;
          report({
            ask: name, user: this.user, data, began, ended: Date.now() + 1, answer: answer ?? null, why, transport,
            greeted: this.greetedAt,
          });
        }
        resolve(answer);
      });
    });
  }

  /** Asks until it is known what became of it; undefined when that takes too long. */
  async insist(name, data) {
    const end = Date.now() + INSIST_MS;
    while (Date.now() < end) {
      await this.connected();
      const answer = await this.ask(name, data);
      if (answer && !AGAIN.has(answer.code)) return answer;
      await pause(100 + below(300));
    }
    return undefined;
  }

  async buy() {
    while (!isCalm) {
      await this.connected();
      await pause(50 + below(400));
      const categoryId = this.categories[below(this.categories.length)];
      const quantity = 1 + below(3);
      this.wishes += 1;
      const requestId = `${this.user}-${this.wishes}`;
      const wish = { eventId: this.event, categoryId, quantity, requestId };
      const granted = await this.insist("lock-tickets", wish);
      if (granted?.success) await this.hold(granted, wish);
    }
    const mine = await this.insist("get-my-locks", {});
    for (const { lockId } of mine?.locks ?? []) await this.insist("unlock-tickets", { lockId });
    report({ calm: this.user });
  }

  /** What somebody does who has tickets. */
  async hold({ lockId, expiresAt }, { categoryId, quantity }) {
    await pause(below(800));
    const choice = random();
    if (choice < 0.4) {
      await this.insist("unlock-tickets", { lockId });
    } else if (choice < 0.75) {
      const order = `${this.user}-${this.wishes}`;
      const ended = new Promise((resolve) => payments.set(order, resolve));
      report({ pay: { user: this.user, order, lockId, categoryId, quantity } });
      await ended;
    } else if (choice < 0.85) {
      // Kept to its end. A moment later the ledger must have ended it by itself.
      while (!isCalm && Date.now() < Date.parse(expiresAt) + 500) await pause(100);
      await this.insist("get-my-locks", {});
    } else {
      await this.insist("get-my-locks", {});
      await this.leaveFor(below(2500));
      await this.connected();
      await this.insist("unlock-tickets", { lockId });
    }
  }

  /** A lost connection, or a page that is closed and opened again. */
  async leaveFor(ms) {
    if (random() < 0.5) {
      this.socket.io.engine?.close();
      return;
    }
    this.socket.disconnect();
    await pause(ms);
    this.socket.connect();
  }
}

function obey(command) {
  switch (command.do) {
    case "begin":
      state = command.seed | 0;
      for (const one of command.people) people.set(one.user, new Person(command, one));
      for (const person of people.values()) if (person.buys) person.buy();
      return undefined;
    case "paid":
      payments.get(command.order)?.();
      return payments.delete(command.order);
    case "views": {
      const views = [...people.values()].map(({ user, isOn, view }) => ({ user, isOn, view: [...view.values()] }));
      return report({ views, id: command.id });
    }
    case "calm":
      isCalm = true;
      return undefined;
    case "check":
      return Promise.all([...people.values()].map((person) => person.insist("get-my-locks", {})))
        .then(() => report({ checked: command.id }));
    default:
      throw new Error(`unknown command ${command.do}`);
  }
}

// When this process has had no processor for a while, that is no fault of the service.
let ticked = Date.now();
setInterval(() => {
  const now = Date.now();
  if (now - ticked > 1000) report({ stalled: true, began: ticked, ended: now });
  ticked = now;
}, 100);

const lines = readline.createInterface({ input: process.stdin });
lines.on("line", (line) => obey(JSON.parse(line)));
// The test is over when it closes our stdin.
lines.on("close", () => process.exit(0));

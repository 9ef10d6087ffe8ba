'use strict';
// Replicas of Seatlock on one Redis, one broker and one events-service, each with its own port.

const fs = require('node:fs');
const path = require('node:path');
const { Process, freePort } = require('./process.js');
const { SECRET } = require('./token.js');
const { Hopeless, until } = require('./wait.js');

const BINARY = process.env.SEATLOCK_BIN ?? path.join(__dirname, '..', '..', '..', 'target', 'debug', 'seatlock');

class Replica {
  constructor(name, environment) {
    this.name = name;
    this.environment = environment;
  }

  get url() {
    return `http://127.0.0.1:${this.port}`;
  }

  async start() {
    if (!fs.existsSync(BINARY)) throw new Error(`no seatlock at ${BINARY}: run "cargo build", or set SEATLOCK_BIN`);
    this.port ??= await freePort();
    this.process = new Process(`seatlock ${this.name}`, BINARY, [], {
      env: {
        PATH: process.env.PATH,
        SEATLOCK_LISTEN: `127.0.0.1:${this.port}`,
        ...this.environment,
      },
    });
    await this.ready();
  }

  /** Until /readyz says 200. */
  ready(ms = 15_000) {
    return until(ms, `${this.name} is ready`, async () => {
      if (!this.process.alive) throw new Hopeless(`${this.name} ended: ${this.process.log.slice(-20).join('\n')}`);
      const answer = await fetch(`${this.url}/readyz`, { signal: AbortSignal.timeout(2000) });
      if (answer.status !== 200) throw new Error(`/readyz ${answer.status} ${await answer.text()}`);
      return true;
    });
  }

  /** A page of its HTTP face: `{status, text, json}`. */
  async http(page) {
    const answer = await fetch(`${this.url}${page}`, { signal: AbortSignal.timeout(5000) });
    const text = await answer.text();
    let json;
    try {
      json = JSON.parse(text);
    } catch {
      // Prometheus text, or a page.
    }
    return { status: answer.status, text, json };
  }

  async availability(eventId) {
    return (await this.http(`/events/${eventId}/availability`)).json;
  }
}

/** What every fleet has unless a scenario says otherwise. Short, so that nothing is waited for longer than it must. */
const DEFAULTS = {
  SEATLOCK_JWT_SECRET: SECRET,
  SEATLOCK_LOCK_TTL: '60s',
  SEATLOCK_CHECKOUT_WINDOW: '20s',
  SEATLOCK_DISCONNECT_GRACE: '5s',
  SEATLOCK_EXPIRY_WARNING: '10s',
  SEATLOCK_SETTLE_TIMEOUT: '10s',
  SEATLOCK_STOCK_REFRESH: '10s',
  SEATLOCK_DRAIN_TIMEOUT: '10s',
  SEATLOCK_LOG: 'info',
};

class Fleet {
  /** @param {{redis: object, env: object, names?: string[]}} parts */
  static async start({ redis, env, names = ['A', 'B'] }) {
    const fleet = new Fleet();
    fleet.replicas = names.map((name) => new Replica(name, {
      ...DEFAULTS,
      ...(redis ? { SEATLOCK_REDIS_URL: redis.url } : {}),
      ...env,
    }));
    await Promise.all(fleet.replicas.map((replica) => replica.start()));
    [fleet.a, fleet.b] = fleet.replicas;
    return fleet;
  }

  /** SIGTERM to all; an exit that is not clean is a failure. */
  async stop() {
    const exits = await Promise.all(this.replicas.map((replica) => replica.process.alive && replica.process.stop(20_000)));
    exits.forEach((exit, i) => {
      if (exit && exit.code !== 0) throw new Error(`replica ${this.replicas[i].name} ended with ${JSON.stringify(exit)}`);
    });
  }
}

module.exports = { BINARY, Fleet };

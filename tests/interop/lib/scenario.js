'use strict';
// One scenario: a stage of real parts that is torn down whatever happens, and evidence when it fails.

const test = require('node:test');
const { BoxOffice } = require('./box-office.js');
const { Client } = require('./client.js');
const { Fleet } = require('./fleet.js');
const { Peer } = require('./peer.js');
const { freePort, stopAll } = require('./process.js');
const { Broker, Wire } = require('./rabbit.js');
const { Redis } = require('./redis.js');
const { until } = require('./wait.js');

let lastQueue = 0;

class Stage {
  constructor() {
    this.processes = [];
    this.clients = [];
    this.peers = [];
    this.wires = [];
    this.queue = `realtime_queue_${process.pid}_${++lastQueue}`;
    this.amqp = process.env.INTEROP_AMQP_URL;
  }

  async redis() {
    this.store = await Redis.start();
    return this.store;
  }

  /** The events-service over 'tcp' or 'rmq'. */
  async events({ transport = 'tcp', major = 11, events, withoutCategories = false }) {
    const place = transport === 'tcp'
      ? { transport, port: await freePort() }
      : { transport, url: this.amqp, queue: `events_queue_${process.pid}_${++lastQueue}` };
    const peer = await Peer.start('events-service', major, { ...place, events, withoutCategories });
    this.peers.push(peer);
    this.place = place;
    this.stock = peer;
    return peer;
  }

  get eventsUrl() {
    return this.place.transport === 'tcp'
      ? `tcp://127.0.0.1:${this.place.port}`
      : `${this.place.url}/?queue=${this.place.queue}`;
  }

  /** The box office, whose events-service is this stage's. */
  async boxOffice(env) {
    const name = `${process.pid}_${++lastQueue}`;
    this.office = await BoxOffice.start({ amqp: this.amqp, queue: this.queue, name, env });
    this.place = { transport: 'tcp', port: this.office.eventsPort };
    return this.office;
  }

  /** An orders-service on that Nest, talking to this stage's queue. */
  async orders(major) {
    const { transport, port, queue } = this.place;
    const peer = await Peer.start('orders-service', major, {
      amqp: this.amqp, queue: this.queue, events: { transport, port, queue },
    });
    this.peers.push(peer);
    return peer;
  }

  /** Two replicas, and Redis first if there is none yet. */
  async fleet(env = {}, names) {
    if (!this.store) await this.redis();
    this.seatlock = await Fleet.start({
      redis: this.store,
      names,
      env: {
        SEATLOCK_AMQP_URL: this.amqp,
        SEATLOCK_AMQP_QUEUE: this.queue,
        SEATLOCK_EVENTS_URL: this.eventsUrl,
        ...env,
      },
    });
    return this.seatlock;
  }

  async client(replica, user, options) {
    const client = new Client(replica, user, options);
    this.clients.push(client);
    return client.open();
  }

  async wire() {
    const wire = await Wire.open(this.amqp);
    this.wires.push(wire);
    return wire;
  }

  /** Until what every replica says of a category is `wanted` (a subset of its fields). */
  agree(eventId, categoryId, wanted, ms = 8000) {
    return until(ms, `every replica says ${JSON.stringify(wanted)} of category ${categoryId}`, async () => {
      for (const replica of this.seatlock.replicas) {
        const all = await replica.availability(eventId);
        const one = Array.isArray(all) ? all.find((category) => category.categoryId === categoryId) : undefined;
        const same = one && Object.entries(wanted).every(([key, value]) => one[key] === value);
        if (!same) throw new Error(`${replica.name}: ${JSON.stringify(one ?? all)}`);
      }
      return true;
    });
  }

  evidence() {
    const lines = [];
    const section = (title, body) => body.length && lines.push(`--- ${title}`, ...body);
    for (const client of this.clients.slice(0, 8)) section(client.name, client.evidence());
    for (const replica of this.seatlock?.replicas ?? []) section(replica.process.name, replica.process.log.slice(-60));
    for (const peer of this.peers) section(peer.name, peer.process.log.slice(-20));
    if (this.office) section('box office', this.office.log);
    if (this.store) section('redis', this.store.process.log.slice(-10));
    return lines.join('\n');
  }

  async close() {
    for (const client of this.clients) client.close();
    let failure;
    const attempt = (step) => step.catch((error) => { failure ??= error; });
    this.store?.thaw();
    if (this.seatlock) await attempt(this.seatlock.stop());
    for (const peer of this.peers) await attempt(peer.stop());
    if (this.office) await attempt(this.office.stop());
    for (const wire of this.wires) await attempt(wire.close());
    if (this.store) await attempt(this.store.remove());
    if (failure) throw failure;
  }
}

let ownBroker;

/** The broker of this file's process: the run's, or one of its own when a file is run alone. */
async function broker() {
  if (process.env.INTEROP_AMQP_URL) return;
  ownBroker = await Broker.start();
  process.env.INTEROP_AMQP_URL = ownBroker.url;
}

/** Declares a scenario. `body` gets the stage. */
function scenario(name, body, { timeout = 60_000 } = {}) {
  test.test(name, { timeout }, async (t) => {
    await broker();
    const stage = new Stage();
    // The runner's own timeout would leave the stage standing, so the body has a bound of its own just below it.
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error(`the scenario took longer than ${timeout} ms`)), timeout - 5000);
    });
    try {
      await Promise.race([body(stage, t), late]);
    } catch (error) {
      console.log(`evidence of "${name}":\n${stage.evidence()}`);
      await stage.close().catch(() => {});
      throw error;
    } finally {
      clearTimeout(timer);
    }
    try {
      await stage.close();
    } catch (error) {
      console.log(`evidence of "${name}":\n${stage.evidence()}`);
      throw error;
    }
  });
}

test.after(async () => {
  await ownBroker?.stop();
  await stopAll();
});

module.exports = { scenario };

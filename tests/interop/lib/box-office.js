'use strict';
// The box office of examples/box-office, one process for each of its services, on a PostgreSQL of its own.

const { randomUUID } = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const { BINARY } = require('./fleet.js');
const { Postgres } = require('./postgres.js');
const { Process, accepts, freePort } = require('./process.js');
const { SECRET, token } = require('./token.js');
const { Hopeless, until } = require('./wait.js');

const PROGRAM = process.env.BOX_OFFICE_BIN ?? path.join(path.dirname(BINARY), 'box-office');
const PARTS = ['events', 'orders', 'gateway'];

class BoxOffice {
  /**
   * @param {{amqp: string, queue: string, name: string, env?: object}} settings `queue` is Seatlock's; `name` tells the
   *   queues of this box office from others on the same broker
   */
  static async start({ amqp, queue, name, env = {} }) {
    if (!fs.existsSync(PROGRAM)) throw new Error(`no box-office at ${PROGRAM}: run "cargo build --workspace", or set BOX_OFFICE_BIN`);
    const office = new BoxOffice();
    office.postgres = await Postgres.start();
    office.processes = new Map();
    office.port = await freePort();
    office.eventsPort = await freePort();
    office.queues = { orders: `orders_queue_${name}`, events: `events_queue_${name}` };
    office.env = {
      PATH: process.env.PATH,
      BOX_OFFICE_DATABASE_URL: office.postgres.url,
      BOX_OFFICE_AMQP_URL: amqp,
      BOX_OFFICE_LISTEN: `127.0.0.1:${office.port}`,
      BOX_OFFICE_EVENTS_LISTEN: `127.0.0.1:${office.eventsPort}`,
      BOX_OFFICE_JWT_SECRET: SECRET,
      BOX_OFFICE_REALTIME_QUEUE: queue,
      BOX_OFFICE_ORDERS_QUEUE: office.queues.orders,
      BOX_OFFICE_EVENTS_QUEUE: office.queues.events,
      BOX_OFFICE_PAYMENT_TIME: '200ms',
      BOX_OFFICE_PAYMENT_FAILS: '0',
      BOX_OFFICE_PAYMENT_ABANDONS: '0',
      BOX_OFFICE_PAYMENT_WINDOW: '5s',
      ...env,
    };
    try {
      for (const part of PARTS) office.launch(part);
      await office.ready();
    } catch (error) {
      await office.stop().catch(() => {});
      throw error;
    }
    return office;
  }

  get url() {
    return `http://127.0.0.1:${this.port}`;
  }

  get eventsUrl() {
    return `tcp://127.0.0.1:${this.eventsPort}`;
  }

  /** Starts one of its services (again). */
  launch(part) {
    const one = new Process(`box office: ${part}`, PROGRAM, [part], { env: this.env });
    this.processes.set(part, one);
    return one;
  }

  /** Until every service answers. */
  ready() {
    return until(30_000, 'the box office answers', async () => {
      for (const one of this.processes.values()) if (!one.alive) throw new Hopeless(`${one.name} ended: ${one.log.join('\n')}`);
      const events = await this.get('/api/events');
      const orders = await this.get('/api/orders', 1);
      return events.status === 200 && orders.status === 200 && (await accepts(this.eventsPort));
    }, 100);
  }

  async http(method, page, user, body, key) {
    const answer = await fetch(`${this.url}${page}`, {
      method,
      headers: {
        'content-type': 'application/json',
        ...(user === undefined ? {} : { authorization: `Bearer ${token(user)}` }),
        ...(key === undefined ? {} : { 'idempotency-key': key }),
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(10_000),
    });
    return { status: answer.status, body: await answer.json() };
  }

  get(page, user) {
    return this.http('GET', page, user);
  }

  post(page, user, body, key) {
    return this.http('POST', page, user, body, key);
  }

  /** An order, asked for until it has an answer: a lost answer is unknown, and the same key is the same order. */
  async buy(user, page, body, { ms = 60_000, key = randomUUID() } = {}) {
    return until(ms, `an answer to the order of user ${user}`, async () => {
      const answer = await this.post(page, user, body, key);
      if (answer.status >= 500) throw new Error(JSON.stringify(answer));
      return answer;
    }, 200);
  }

  /** Until an order is `completed` or `cancelled`. */
  settled(user, orderId, ms = 20_000) {
    return until(ms, `order ${orderId} is settled`, async () => {
      const { body } = await this.get(`/api/orders/${orderId}`, user);
      return ['completed', 'cancelled'].includes(body.step) && body;
    }, 50);
  }

  query(sql) {
    return this.postgres.query(sql);
  }

  /** A number that the database holds. */
  count(sql) {
    return Number(this.query(sql));
  }

  get log() {
    return [...this.processes.values()].flatMap((one) => [`(${one.name})`, ...one.log.slice(-25)]);
  }

  async stop() {
    for (const one of this.processes.values()) if (one.alive) await one.stop();
    await this.postgres.stop();
  }
}

module.exports = { BoxOffice, PROGRAM };

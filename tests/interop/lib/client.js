'use strict';
// A browser: the unmodified socket.io-client, and a record of everything it was told.

const { io } = require('socket.io-client');
const { token } = require('./token.js');
const { within } = require('./wait.js');

/** Request and the name under which its answer comes when no acknowledgement was asked for. */
const ANSWER = {
  'join-event-room': 'joined-event-room',
  'leave-event-room': 'left-event-room',
  'lock-tickets': 'lock-tickets-response',
  'unlock-tickets': 'unlock-tickets-response',
  'get-my-locks': 'my-locks-response',
  heartbeat: 'heartbeat-response',
  'refresh-token': 'refresh-token-response',
};

/** What stock clients open with, and what impatient ones do. */
const TRANSPORTS = { default: undefined, websocket: ['websocket'], polling: ['polling'] };

class Client {
  /**
   * @param {{url: string, name: string}} replica
   * @param {number} user
   * @param {{name?: string, transport?: keyof TRANSPORTS, token?: string|null, query?: object, extraHeaders?: object,
   *   reconnect?: boolean}} options `token: null` sends none in `auth`
   */
  constructor(replica, user, options = {}) {
    this.user = user;
    this.name = `${options.name ?? `user ${user}`} at ${replica.name}`;
    this.history = [];
    this.watchers = new Set();
    const transports = TRANSPORTS[options.transport ?? 'default'];
    this.socket = io(`${replica.url}/realtime`, {
      ...(transports ? { transports } : {}),
      ...(options.token === null ? {} : { auth: { token: options.token ?? token(user) } }),
      ...(options.query ? { query: options.query } : {}),
      ...(options.extraHeaders ? { extraHeaders: options.extraHeaders } : {}),
      forceNew: true,
      reconnection: options.reconnect ?? false,
      reconnectionDelay: 100,
      reconnectionDelayMax: 500,
      timeout: 10_000,
      autoConnect: false,
    });
    this.socket.onAny((name, ...data) => this.record(name, ...data));
    this.socket.on('connect', () => this.record('(connect)', { id: this.socket.id }));
    this.socket.on('disconnect', (reason) => this.record('(disconnect)', { reason }));
    this.socket.on('connect_error', (error) => this.record('(connect_error)', { message: error.message }));
  }

  /** Connected and greeted. */
  static async connect(replica, user, options) {
    const client = new Client(replica, user, options);
    return client.open();
  }

  async open(ms = 10_000) {
    const from = this.mark();
    this.socket.connect();
    const refusal = this.next('(connect_error)', { from, within: ms });
    refusal.catch(() => {});
    const first = await Promise.race([
      this.next('connected', { from, within: ms }).then((data) => ({ data })),
      refusal.then((error) => ({ error })),
    ]);
    if (first.error) {
      this.close();
      throw new Error(`${this.name} was refused: ${first.error.message}`);
    }
    this.greeting = first.data;
    return this;
  }

  /** The message of the `connect_error` that must come. */
  static async refused(replica, user, options) {
    const client = new Client(replica, user, options);
    client.socket.connect();
    try {
      return (await client.next('(connect_error)', { within: 10_000 })).message;
    } finally {
      client.close();
    }
  }

  record(name, data, ...more) {
    const entry = { at: Date.now(), name, data, ...(more.length ? { more } : {}) };
    this.history.push(entry);
    for (const watcher of [...this.watchers]) watcher(entry);
  }

  /** A place in the history, to look from. */
  mark() {
    return this.history.length;
  }

  /** All messages of that name. */
  all(name, { from = 0, where = () => true } = {}) {
    return this.history.slice(from).filter((entry) => entry.name === name && where(entry.data)).map((entry) => entry.data);
  }

  /** The first message of that name from `from` on for which `where` holds: from the record, or the next to come. */
  next(name, { from = 0, where = () => true, within: ms = 8000, what } = {}) {
    const [past] = this.all(name, { from, where });
    if (past !== undefined) return Promise.resolve(past);
    let watcher;
    const found = new Promise((resolve) => {
      watcher = (entry) => entry.name === name && where(entry.data) && resolve(entry.data);
      this.watchers.add(watcher);
    });
    const label = `${this.name} gets ${name}${what ? ` (${what})` : ''}`;
    return within(ms, label, found).finally(() => this.watchers.delete(watcher));
  }

  /** The next `availability-update` of a category for which `where` holds. */
  update(categoryId, where, options = {}) {
    return this.next('availability-update', { ...options, where: (data) => data.categoryId === categoryId && where(data) });
  }

  /** A request with an acknowledgement: resolves with what the acknowledgement carried. */
  ask(name, data, ms = 8000) {
    const args = data === undefined ? [] : [data];
    const answer = new Promise((resolve) => this.socket.emit(name, ...args, resolve));
    return within(ms, `${this.name} has an acknowledgement of ${name} ${JSON.stringify(data)}`, answer);
  }

  /** A request without one: resolves with the answer's own message. */
  tell(name, data, ms = 8000) {
    const from = this.mark();
    const args = data === undefined ? [] : [data];
    this.socket.emit(name, ...args);
    return this.next(ANSWER[name], { from, within: ms, what: `the answer to ${name} ${JSON.stringify(data)}` });
  }

  lock(eventId, categoryId, quantity, more = {}) {
    return this.ask('lock-tickets', { eventId, categoryId, quantity, ...more });
  }

  join(eventId) {
    return this.ask('join-event-room', { eventId });
  }

  close() {
    this.socket.disconnect();
  }

  /** The last `lines` things that happened, for whoever has to understand a failure. */
  evidence(lines = 40) {
    const clock = (at) => new Date(at).toISOString().slice(11, 23);
    return this.history.slice(-lines).map((entry) => `${clock(entry.at)} ${entry.name} ${JSON.stringify(entry.data)}`);
  }
}

module.exports = { ANSWER, Client };

'use strict';
// A Redis of one's own: no persistence, a free port and a Unix socket, can be stopped, continued, killed and started again.

const { once } = require('node:events');
const fs = require('node:fs');
const net = require('node:net');
const os = require('node:os');
const path = require('node:path');
const { Process, accepts, freePort, removeFolder } = require('./process.js');
const { Hopeless, until, within } = require('./wait.js');

class Redis {
  static async start() {
    const redis = new Redis();
    redis.port = await freePort();
    redis.dir = fs.mkdtempSync(path.join(os.tmpdir(), 'seatlock-redis-'));
    await redis.restart();
    return redis;
  }

  get url() {
    return `redis://127.0.0.1:${this.port}/`;
  }

  get unixUrl() {
    return `unix:${path.join(this.dir, 'socket')}`;
  }

  /** Writes its data down now: the next start goes on from there. */
  async save() {
    const socket = net.connect(this.port, '127.0.0.1');
    socket.write('SAVE\r\n');
    const [answer] = await within(10_000, 'redis-server saves', once(socket, 'data'));
    socket.destroy();
    if (!answer.toString().startsWith('+OK')) throw new Error(`SAVE: ${answer}`);
  }

  /** Starts the server (again), empty unless it was saved. */
  async restart() {
    this.process = new Process('redis', 'redis-server', [
      '--port', String(this.port), '--bind', '127.0.0.1', '--unixsocket', path.join(this.dir, 'socket'), '--dir', this.dir,
      '--save', '', '--appendonly', 'no', '--loglevel', 'warning',
    ]);
    await until(10_000, 'redis-server accepts connections', () => {
      if (!this.process.alive) throw new Hopeless(this.process.log.join('\n'));
      return accepts(this.port);
    });
  }

  /** Still there, answers nothing: what a hung server or a cut network looks like. */
  freeze() {
    this.process.signal('SIGSTOP');
  }

  thaw() {
    this.process.signal('SIGCONT');
  }

  kill() {
    return this.process.kill();
  }

  /** Ends it for good. */
  async remove() {
    if (this.process.alive) await this.process.kill();
    removeFolder(this.dir);
  }
}

module.exports = { Redis };

'use strict';
// Processes that a run owns: started with a bounded log, ended by their own id, never left behind.

const { spawn } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const { within } = require('./wait.js');

const LOG_LINES_MAX = 2000;
const running = new Set();

let tried = 0;

/** A free TCP port of the loopback interface. */
async function freePort() {
  for (;;) {
    // Below the ports that systems give to connections, and each process looks somewhere else: nobody takes it meanwhile.
    const port = 10_000 + (process.pid * 61 + tried++) % 20_000;
    const server = net.createServer();
    const free = await new Promise((resolve) => {
      server.once('error', () => resolve(false));
      server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)));
    });
    if (free) return port;
    if (tried > 20_000) throw new Error('no free port');
  }
}

/** Removes the files of a process that has ended, while helpers of its own may still be on their way out. */
function removeFolder(folder) {
  fs.rmSync(folder, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
}

/** True when something accepts connections there. */
function accepts(port) {
  return new Promise((resolve) => {
    const socket = net.connect({ port, host: '127.0.0.1' });
    const done = (answer) => {
      socket.destroy();
      resolve(answer);
    };
    socket.setTimeout(1000, () => done(false));
    socket.on('connect', () => done(true));
    socket.on('error', () => done(false));
  });
}

class Process {
  /**
   * @param {string} name how the evidence calls it
   * @param {string} command
   * @param {string[]} args
   * @param {{env?: object, ipc?: boolean, cwd?: string, uid?: number, gid?: number}} options
   */
  constructor(name, command, args, options = {}) {
    this.name = name;
    this.log = [];
    this.child = spawn(command, args, {
      cwd: options.cwd,
      env: options.env ?? process.env,
      uid: options.uid,
      gid: options.gid,
      stdio: ['ignore', 'pipe', 'pipe', ...(options.ipc ? ['ipc'] : [])],
    });
    this.pid = this.child.pid;
    this.ended = new Promise((resolve) => {
      this.child.once('error', (error) => {
        this.note(`cannot be started: ${error.message}`);
        resolve({ code: null, signal: null, error });
      });
      this.child.once('exit', (code, signal) => {
        this.exit = { code, signal };
        resolve(this.exit);
      });
    });
    this.ended.then(() => running.delete(this));
    for (const stream of [this.child.stdout, this.child.stderr]) {
      let rest = '';
      stream.setEncoding('utf8');
      stream.on('data', (text) => {
        const lines = (rest + text).split('\n');
        rest = lines.pop();
        for (const line of lines) this.note(line);
      });
      stream.on('end', () => rest && this.note(rest));
    }
    running.add(this);
  }

  note(line) {
    if (this.log.length >= LOG_LINES_MAX) this.log.shift();
    this.log.push(line);
  }

  get alive() {
    return this.pid !== undefined && this.exit === undefined;
  }

  signal(name) {
    if (this.alive) this.child.kill(name);
  }

  /** SIGTERM, and SIGKILL when that was not enough. Says how it ended. */
  async stop(ms = 10_000) {
    this.signal('SIGCONT');
    this.signal('SIGTERM');
    try {
      return await within(ms, `${this.name} ends after SIGTERM`, this.ended);
    } catch (error) {
      await this.kill();
      throw error;
    }
  }

  /** SIGKILL: what a crash looks like. */
  async kill() {
    this.signal('SIGKILL');
    return within(5000, `${this.name} ends after SIGKILL`, this.ended);
  }
}

/** Ends whatever is still running, the youngest first. */
async function stopAll() {
  for (const one of [...running].reverse()) await one.kill().catch(() => {});
}

// A run that dies for any reason takes its processes with it.
process.on('exit', () => {
  for (const one of running) {
    one.signal('SIGKILL');
  }
});
for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(name, () => process.exit(1));

module.exports = { Process, accepts, freePort, removeFolder, stopAll };

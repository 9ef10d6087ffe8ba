'use strict';
// A load balancer in front of several replicas that gives a cookie: whoever does not send it back comes to another replica
// with each request. HTTP alone, so that what is shown is polling.

const http = require('node:http');

class Sticky {
  /** @param {{url: string}[]} replicas */
  static async start(replicas) {
    const sticky = new Sticky();
    let turn = 0;
    sticky.server = http.createServer((request, response) => {
      const kept = /\bSEATLOCK=(\d+)/.exec(request.headers.cookie ?? '')?.[1];
      const index = kept ?? ++turn % replicas.length;
      const { hostname, port } = new URL(replicas[index].url);
      const { method, url: path, headers } = request;
      const onward = http.request({ hostname, port, method, path, headers }, (answer) => {
        const cookie = kept ? {} : { 'set-cookie': [`SEATLOCK=${index}; path=/; HttpOnly`] };
        response.writeHead(answer.statusCode, { ...answer.headers, ...cookie });
        answer.pipe(response);
      });
      onward.on('error', () => response.destroy());
      request.pipe(onward);
    });
    await new Promise((resolve) => sticky.server.listen(0, '127.0.0.1', resolve));
    return sticky;
  }

  get url() {
    return `http://127.0.0.1:${this.server.address().port}`;
  }

  async stop() {
    const closed = new Promise((resolve) => this.server.close(resolve));
    this.server.closeAllConnections();
    await closed;
  }
}

module.exports = { Sticky };

// A page that is opened from a folder may start no worker. There, the search's script runs in a hidden frame instead,
// which has what it asks of a worker: messages in, messages out, and further scripts.
if (location.protocol === "file:") {
  const load = (page, url) =>
    new Promise((done, failed) => {
      const script = page.createElement("script");
      script.src = url;
      script.onload = done;
      script.onerror = failed;
      page.head.appendChild(script);
    });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((done) => frame.addEventListener("load", () => done(frame.contentWindow), { once: true }))
        .then((inside) => {
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          inside.importScripts = async (...urls) => {
            for (const each of urls) await load(inside.document, each);
          };
          return load(inside.document, url).then(() => inside);
        });
      this.ready.catch(() => this.dispatchEvent(new Event("error")));
      document.body.appendChild(frame);
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}

// Keeps the page's files, so that it opens without a network once it was opened with one. The build knows which.
/* global CACHE, FILES */
const keep = async () => { await (await caches.open(CACHE)).addAll(FILES); await skipWaiting() }
const tidy = async () => {
  const old = (await caches.keys()).filter(name => name.startsWith("rotate-") && name != CACHE)
  await Promise.all([clients.claim(), ...old.map(name => caches.delete(name))])
}
const answer = async request => await caches.match(request) ?? fetch(request)
addEventListener("install", event => event.waitUntil(keep()))
addEventListener("activate", event => event.waitUntil(tidy()))
addEventListener("fetch", event => event.respondWith(answer(event.request)))

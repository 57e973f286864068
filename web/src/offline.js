// Keeps the page's files, so that it opens without a network once it was opened with one. CACHE and FILES come from the build.
/* global CACHE, FILES */
addEventListener("install", event => event.waitUntil(caches.open(CACHE).then(cache => cache.addAll(FILES)).then(() => skipWaiting())))

addEventListener("activate", event => event.waitUntil((async () => {
  const old = (await caches.keys()).filter(name => name.startsWith("rotate-") && name != CACHE)
  await Promise.all(old.map(name => caches.delete(name)))
  await clients.claim()
})()))

addEventListener("fetch", event => event.respondWith((async () => await caches.match(event.request) ?? fetch(event.request))()))

// Ranks and the tone curve: grey value ↔ line integral, as in radrotator/tone.py.

/** How many of the sorted values are below x, or (with `equal`) not above it. */
function count(sorted, x, equal) {
  let low = 0, high = sorted.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (sorted[middle] < x || equal && sorted[middle] === x) low = middle + 1
    else high = middle
  }
  return low
}

/** The share of known values that are darker, and half of those that are equal. */
export function midRanks(values, known) {
  const sorted = Float32Array.from(values.filter((_, i) => known[i] > 0)).sort()
  return Float32Array.from(values, x => (count(sorted, x, false) + count(sorted, x, true))/(2*sorted.length))
}

/** y at x, linear between the knots; constant beyond them. */
function interpolate(x, xs, ys) {
  const right = count(xs, x, true)
  if (right == 0) return ys[0]
  if (right == xs.length) return ys[right - 1]
  const left = right - 1
  return ys[left] + (ys[right] - ys[left])/(xs[right] - xs[left])*(x - xs[left])
}

/** The same, going on beyond the ends as steeply as the last twentieth of the table. */
function extrapolator(xs, ys) {
  const last = xs.length - 1, step = Math.max(1, Math.floor(xs.length/20))
  if (last < 1) return x => interpolate(x, xs, ys)
  const slope = (i, j) => (ys[i] - ys[j])/Math.max(xs[i] - xs[j], 1e-9)
  const below = slope(step, 0), above = slope(last, last - step)
  return x => interpolate(x, xs, ys) + below*Math.min(x - xs[0], 0) + above*Math.max(x - xs[last], 0)
}

/** Every grey value of a picture, and the line integral of its rank: {greys, integrals}. */
export function curveFromRanks(pixels, knots, levels) {
  const sorted = pixels.slice().sort(), greys = [], integrals = []
  for (let start = 0, end; start < sorted.length; start = end) {
    end = start + 1
    while (sorted[end] === sorted[start]) end++
    greys.push(sorted[start])
    integrals.push(interpolate((start + end)/2/sorted.length, levels, knots))
  }
  return {greys: Float64Array.from(greys), integrals: Float64Array.from(integrals)}
}

export function toIntegrals(curve, pixels) {
  const value = extrapolator(curve.greys, curve.integrals)
  return Float32Array.from(pixels, x => Math.max(0, value(x)))
}

/** The curve back, at even steps: {low, scale, table}. */
export function wayBack(curve, steps) {
  let most = -Infinity
  const rising = curve.integrals.map((x, i) => most = Math.max(most, x + 1e-9*i))
  const low = rising[0], top = rising[rising.length - 1], high = top + 0.5*Math.max(top - low, 1e-6)
  const value = extrapolator(rising, curve.greys)
  const table = Float32Array.from({length: steps + 1}, (_, i) => value(low + (high - low)*i/steps))
  return {low, scale: steps/(high - low), table}
}

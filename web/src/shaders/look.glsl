// What both passes know; K, the number of slabs, is defined above it.
precision highp float; precision highp int; precision highp sampler2D; precision highp sampler2DArray;
const float A = -.75;
uniform mat3 planes[K]; uniform float h; uniform vec3 normal; out vec4 result;
vec3 find(int k, vec2 p) {  // where in the input, and the gain
  vec3 q = planes[k]*vec3(p, 1.), ray = vec3(-h*p.x, -1., -h*p.y); q.xy /= q.z;
  return vec3(q.xy, length(ray)/abs(dot(ray, normal))/sqrt(1. + h*h*dot(q.xy, q.xy)));
}
float near(float t) { return ((A + 2.)*t - A - 3.)*t*t + 1.; }
float far(float t) { return ((A*t - 5.*A)*t + 8.*A)*t - 4.*A; }
vec4 cubic(float t) { return vec4(far(t + 1.), near(t), near(1. - t), far(2. - t)); }
vec2 pixel(vec2 p, vec2 size) { return ((p + 1.)*size - 1.)/2.; }
#define ROW(TAP, at) dot(wx, vec4(TAP(xs.x, at), TAP(xs.y, at), TAP(xs.z, at), TAP(xs.w, at)))
#define CUBIC(TAP, ZEROS) vec2 low = floor(place); vec4 wx = cubic(place.x - low.x), wy = cubic(place.y - low.y); \
  ivec4 ux = int(low.x) + ivec4(-1, 0, 1, 2), uy = int(low.y) + ivec4(-1, 0, 1, 2); \
  ivec4 xs = clamp(ux, 0, size.x - 1), ys = clamp(uy, 0, size.y - 1); \
  if (ZEROS) { wx *= vec4(equal(xs, ux)); wy *= vec4(equal(ys, uy)); } \
  return dot(wy, vec4(ROW(TAP, ys.x), ROW(TAP, ys.y), ROW(TAP, ys.z), ROW(TAP, ys.w)));
#define LINEAR(FETCH) place = clamp(place, vec2(0.), vec2(size - 1)); \
  ivec2 low = ivec2(place), top = min(low + 1, size - 1); vec2 t = place - vec2(low); \
  return mix(mix(FETCH(low), FETCH(ivec2(top.x, low.y)), t.x), mix(FETCH(ivec2(low.x, top.y)), FETCH(top), t.x), t.y);

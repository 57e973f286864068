// The view: the soft part enlarged, the fine part from where its depth says, and back into grey values.
uniform sampler2D coarse, fine, field, before, table; uniform sampler2DArray shares;
uniform float detail, low, scale, steps, split, grain;
#define COARSE(i, j) texelFetch(coarse, ivec2(i, j), 0).r
float softly(vec2 place) { ivec2 size = textureSize(coarse, 0); CUBIC(COARSE, false) }
#define FINE(i, j) texelFetch(fine, ivec2(i, j), 0).r
float finely(vec2 place) { ivec2 size = textureSize(fine, 0); CUBIC(FINE, true) }
#define FIELD(at) texelFetch(field, at, 0)
vec4 moved(vec2 place) { ivec2 size = textureSize(field, 0); LINEAR(FIELD) }
#define SHARE(at) texelFetch(shares, ivec3(at, k), 0).r
float share(int k, vec2 place) { ivec2 size = textureSize(shares, 0).xy; LINEAR(SHARE) }
float grey(int i) { int width = textureSize(table, 0).x; return texelFetch(table, ivec2(i % width, i / width), 0).r; }
void main() {
  vec2 size = vec2(textureSize(fine, 0)), S = vec2(textureSize(field, 0));
  vec2 at = gl_FragCoord.xy*grain; float side = max(size.x, size.y);
  ivec2 here = clamp(ivec2(at.x, size.y - at.y), ivec2(0), ivec2(size) - 1);
  vec2 p = (vec2(here)*2. + 1. - size)/side, scaled = size/side;
  if (float(here.x) < split*size.x) { result = vec4(vec3(texelFetch(before, here, 0).r), 1.); return; }
  float sum = softly(pixel(p*S/vec2(textureSize(coarse, 0)), vec2(textureSize(coarse, 0))));
  if (detail > 0.) { vec4 f = moved(pixel(p, S)); sum += detail*f.z*finely(pixel((p + f.xy)/scaled, size)); }
  if (detail < 1.) for (int k = 0; k < K; k++) {
    vec2 q = clamp(p, 1./S - 1., 1. - 1./S); vec3 f = find(k, q); f.xy += p - q;
    float part = (1. - detail)*f.z*share(k, pixel(f.xy, S));
    if (part > 1e-5) sum += part*finely(pixel(f.xy/scaled, size));
  }
  float place = clamp((sum - low)*scale, 0., steps); int left = int(place);
  result = vec4(vec3(clamp(mix(grey(left), grey(left + 1), place - float(left)), 0., 1.)), 1.);
}

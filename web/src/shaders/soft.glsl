// The soft part, slab by slab, a little wider than the picture and as coarse as the network.
uniform sampler2DArray soft; uniform float wide;
#define SOFT(i, j) texelFetch(soft, ivec3(i, j, k), 0).r
float slab(int k, vec2 place) { ivec2 size = textureSize(soft, 0).xy; CUBIC(SOFT, false) }
void main() {
  vec2 p = gl_FragCoord.xy*2./wide - 1., canvas = vec2(textureSize(soft, 0).xy); float sum = 0.;
  for (int k = 0; k < K; k++) { vec3 q = find(k, p); sum += q.z*slab(k, pixel(q.xy*wide/canvas, canvas)); }
  result = vec4(sum, 0., 0., 1.);
}

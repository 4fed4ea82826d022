package bench

import (
	"slices"
	"testing"
)

func TestKubernetesCases(t *testing.T) {
	for in, want := range map[string]string{
		"python/runtime": "python/runtime", "python/runtime/1": "python/runtime", "native/runtime/20": "native/runtime/20",
		"image/sandbox": "image/sandbox", "image/sandbox/5": "image/sandbox/5",
	} {
		c, err := parseKubernetesCase(in)
		if err != nil || c.String() != want {
			t.Errorf("case %q: %v, %v; want %s", in, c, err, want)
		}
	}
	for _, in := range []string{"", "python", "python/revision", "image/runtime", "perl/runtime", "python/runtime/0", "python/runtime/1/2"} {
		if c, err := parseKubernetesCase(in); err == nil {
			t.Errorf("case %q was taken for %v", in, c)
		}
	}
	o := &Options{Cases: []string{"native/runtime/20", "native/runtime", "native/runtime/1"}}
	cases, err := o.kubernetesCases()
	if err != nil || len(cases) != 2 || cases[0].n != 1 {
		t.Errorf("cases %v, %v: want one alone before twenty", cases, err)
	}
	if usual, err := (&Options{Quick: true}).kubernetesCases(); err != nil || !slices.ContainsFunc(usual, func(c kubernetesCase) bool { return c.n == 20 }) {
		t.Errorf("a quick run has the cases %v, %v: want one of 20 at once", usual, err)
	}
}

package deploy_test

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/hearth-serverless/hearth/deploy"
)

// helm renders the chart with values, by Helm's own engine, custom resources included.
func helm(t *testing.T, values string) ([]map[string]any, error) {
	t.Helper()
	chart, err := loader.Load("helm/hearth")
	if err != nil {
		t.Fatal(err)
	}
	given := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	all, err := util.ToRenderValues(chart, given, common.ReleaseOptions{Name: "hearth", Namespace: "default", IsInstall: true, Revision: 1}, nil)
	if err != nil {
		return nil, err
	}
	rendered, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	var objects []map[string]any
	for _, c := range chart.CRDObjects() {
		objects = append(objects, split(t, string(c.File.Data))...)
	}
	for name, text := range rendered {
		if strings.HasSuffix(name, ".yaml") {
			objects = append(objects, split(t, text)...)
		}
	}
	return objects, nil
}

func split(t *testing.T, text string) []map[string]any {
	t.Helper()
	var objects []map[string]any
	for decoder := utilyaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(text))); ; {
		document := make([]byte, 1<<20)
		n, err := decoder.Read(document)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatal(err)
		}
		if o := parse(t, document[:n]); len(o) > 0 {
			objects = append(objects, o)
		}
	}
}

func byKey(objects []map[string]any) map[string]any {
	out := map[string]any{}
	for _, o := range objects {
		out[key(o)] = o
	}
	return out
}

// TestHelmIsKustomize compares the chart with base and with every overlay, object by object.
func TestHelmIsKustomize(t *testing.T) {
	for dir, values := range map[string]string{
		"base":                 "",
		"overlays/small":       "{poolmanager: {replicas: 1}, gateway: {replicas: 1}}",
		"overlays/internet":    "{functions: {internet: true}}",
		"overlays/redhat":      "{nodeagent: {redhat: true}}",
		"overlays/refuse-edit": "{nodeagent: {editContainerdConfig: false}}",
		"overlays/monitoring":  "{monitoring: {enabled: true}}",
		"overlays/registry":    "{image: {registry: registry.example, tag: v1}}",
	} {
		objects, err := helm(t, values)
		if err != nil {
			t.Fatal(err)
		}
		want, got := byKey(kustomize(t, dir)), byKey(objects)
		if len(got) != len(objects) {
			t.Errorf("%s: Helm has an object twice", dir)
		}
		for k := range got {
			if want[k] == nil {
				t.Errorf("%s: Helm has %s, and kustomize has not", dir, k)
			}
		}
		for k := range want {
			if diff := cmp.Diff(want[k], got[k]); diff != "" {
				t.Errorf("%s, %s, kustomize's and Helm's: %s", dir, k, diff)
			}
		}
	}
}

// TestHelmValues sets what no overlay does.
func TestHelmValues(t *testing.T) {
	objects, err := helm(t, `
image: {registry: "registry.example:5000/hearth", digests: {pause: "sha256:`+strings.Repeat("a", 64)+`"}, pullSecrets: [{name: s}]}
namespaces: {create: false}
poolmanager: {args: [--pool-size=1]}
gateway: {domain: fn.example, args: [--log-level=debug], service: {type: LoadBalancer, annotations: {a: b}}}
nodeagent: {nodeSelector: {functions: "yes"}, env: [{name: HEARTH_LOG_LEVEL, value: debug}], args: [--sidecar=sidecar]}
`)
	if err != nil {
		t.Fatal(err)
	}
	typed(t, objects)
	text, err := yaml.Marshal(objects)
	if err != nil {
		t.Fatal(err)
	}
	for says, times := range map[string]int{
		"image: registry.example:5000/hearth/hearth/pause@sha256:" + strings.Repeat("a", 64): 1,
		"value: registry.example:5000/hearth/hearth/pause@sha256:" + strings.Repeat("a", 64): 1,
		"image: registry.example:5000/hearth/hearth/gateway:" + deploy.Tag:                   1,
		"imagePullSecrets:": 3, "--domain=fn.example": 1, "type: LoadBalancer": 1, "functions: \"yes\"": 1, "HEARTH_LOG_LEVEL": 2,
		"--sidecar=sidecar": 1, "--pool-size=1": 1, "--log-level=debug": 1, "kind: Namespace\n": 0,
	} {
		if n := strings.Count(string(text), says); n != times {
			t.Errorf("%q is there %d times, not %d", says, n, times)
		}
	}
	for values, says := range map[string]string{
		"{gateway: {replica: 3}}":                "replica",
		"{gateway: {replicas: 0}}":               "replicas",
		"{image: {digests: {gateway: latest}}}":  "digests",
		"{image: {registry: registry.example/}}": "registry",
		"{nodeagent: {args: [sidecar]}}":         "args",
	} {
		if _, err := helm(t, values); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", values, err)
		}
	}
}

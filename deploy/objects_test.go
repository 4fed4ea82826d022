package deploy_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/internal/release"
)

// overlays are all that kustomize is run on here.
func overlays(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob("overlays/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("overlays: %v, %v", dirs, err)
	}
	return append(dirs, "base", "uninstall")
}

// kustomize builds a folder as `kubectl kustomize` does.
func kustomize(t *testing.T, dir string) []map[string]any {
	t.Helper()
	options := krusty.MakeDefaultOptions()
	options.Reorder = krusty.ReorderOptionUnspecified
	built, err := krusty.MakeKustomizer(options).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatalf("kustomize %s: %v", dir, err)
	}
	var objects []map[string]any
	for _, r := range built.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, parse(t, text))
	}
	return objects
}

func parse(t *testing.T, text []byte) map[string]any {
	t.Helper()
	var o map[string]any
	if err := yaml.UnmarshalStrict(text, &o); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return o
}

// key names an object.
func key(o map[string]any) string {
	m, _ := o["metadata"].(map[string]any)
	return fmt.Sprint(o["kind"], " ", m["namespace"], "/", m["name"])
}

func TestObjectsAreKustomizes(t *testing.T) {
	for dir, get := range map[string]func(map[string]string) ([]map[string]any, error){"base": deploy.Objects, "uninstall": deploy.Unregister} {
		objects, err := get(nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(kustomize(t, dir), objects); diff != "" {
			t.Errorf("%s: %s", dir, diff)
		}
	}
}

// refs are images as a registry has them.
func refs() map[string]string {
	out := map[string]string{}
	for _, name := range release.Names() {
		out[name] = "registry.example:5000/" + name + "@sha256:" + strings.Repeat("a", 64)
	}
	return out
}

// image is what any image of the manifests looks like, wherever it stands.
var image = regexp.MustCompile(`^(.*/)?hearth/[a-z]+[:@]`)

// images are all strings that look like one of ours.
func images(value any, found map[string]bool) {
	switch v := value.(type) {
	case string:
		if image.MatchString(v) {
			found[v] = true
		}
	case []any:
		for _, e := range v {
			images(e, found)
		}
	case map[string]any:
		for _, e := range v {
			images(e, found)
		}
	}
}

func TestImages(t *testing.T) {
	for _, c := range []struct {
		name    string
		objects func() ([]map[string]any, error)
		want    func(name string) string
	}{
		{"as they are", func() ([]map[string]any, error) { return deploy.Objects(nil) }, func(name string) string { return name + ":" + deploy.Tag }},
		{"installed", func() ([]map[string]any, error) { return deploy.Objects(refs()) }, func(name string) string { return refs()[name] }},
		{"overlay", func() ([]map[string]any, error) { return kustomize(t, "overlays/registry"), nil }, func(name string) string { return "registry.example/" + name + ":v1" }},
	} {
		objects, err := c.objects()
		if err != nil {
			t.Fatal(err)
		}
		found, want := map[string]bool{}, map[string]bool{}
		for _, o := range objects {
			images(o, found)
		}
		for _, name := range release.Names() {
			want[c.want(name)] = true
		}
		if diff := cmp.Diff(want, found); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
		pause := ""
		for _, e := range container(t, typed(t, objects), "poolmanager").Env {
			if e.Name == "HEARTH_HOLDER_IMAGE" {
				pause = e.Value
			}
		}
		if pause != c.want("hearth/pause") {
			t.Errorf("%s: poolmanager is told that the holder is %q", c.name, pause)
		}
	}
}

// typed decodes objects into the types that the API server has for them.
func typed(t *testing.T, objects []map[string]any) []runtime.Object {
	t.Helper()
	var out []runtime.Object
	for _, o := range objects {
		if strings.HasPrefix(fmt.Sprint(o["apiVersion"]), "monitoring.coreos.com/") {
			continue // of the Prometheus operator, whose types are no part of a cluster
		}
		decoded, err := decode(o)
		if err != nil {
			t.Errorf("%s: %v", key(o), err)
			continue
		}
		out = append(out, decoded)
	}
	return out
}

// decode takes what the API server does not know for an error.
func decode(o map[string]any) (runtime.Object, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientscheme.AddToScheme, apiextensions.AddToScheme, crd.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	text, err := yaml.Marshal(o)
	if err != nil {
		return nil, err
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Strict: true, Yaml: true})
	decoded, _, err := decoder.Decode(text, nil, nil)
	return decoded, err
}

func TestObjectsAreTyped(t *testing.T) {
	for _, dir := range overlays(t) {
		seen := map[string]bool{}
		objects := kustomize(t, dir)
		for _, o := range objects {
			if seen[key(o)] {
				t.Errorf("%s: there are two %s", dir, key(o))
			}
			seen[key(o)] = true
		}
		typed(t, objects)
	}
	bad := kustomize(t, "uninstall")[0]
	bad["spec"].(map[string]any)["replicas"] = 1 // a DaemonSet has none
	if _, err := decode(bad); err == nil {
		t.Error("an unknown field is not noticed")
	}
}

// TestRulesOfOperator are those of the file.
func TestRulesOfOperator(t *testing.T) {
	text, err := deploy.Seen.ReadFile("prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range kustomize(t, "overlays/monitoring") {
		if o["kind"] == "PrometheusRule" {
			if diff := cmp.Diff(parse(t, text), o["spec"]); diff != "" {
				t.Error(diff)
			}
			return
		}
	}
	t.Error("there are none")
}

// workload is what makes pods.
type workload struct {
	name, namespace string
	template        *corev1.PodTemplateSpec
	selector        *metav1.LabelSelector
}

func workloads(objects []runtime.Object) []workload {
	var out []workload
	for _, o := range objects {
		switch o := o.(type) {
		case *appsv1.Deployment:
			out = append(out, workload{o.Name, o.Namespace, &o.Spec.Template, o.Spec.Selector})
		case *appsv1.DaemonSet:
			out = append(out, workload{o.Name, o.Namespace, &o.Spec.Template, o.Spec.Selector})
		}
	}
	return out
}

func container(t *testing.T, objects []runtime.Object, name string) corev1.Container {
	t.Helper()
	for _, w := range workloads(objects) {
		for _, c := range w.template.Spec.Containers {
			if c.Name == name {
				return c
			}
		}
	}
	t.Fatalf("there is no container %s", name)
	return corev1.Container{}
}

// TestPodsKeepToPodSecurity asks the code by which the API server judges.
func TestPodsKeepToPodSecurity(t *testing.T) {
	judge, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	restricted := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	judged := 0
	for _, w := range workloads(typed(t, kustomize(t, "base"))) {
		result := policy.AggregateCheckResults(judge.EvaluatePod(restricted, &w.template.ObjectMeta, &w.template.Spec))
		if w.name == "nodeagent" {
			if result.Allowed {
				t.Error("nodeagent needs no privilege any more: its namespace can be restricted")
			}
			continue
		}
		judged++
		if !result.Allowed {
			t.Errorf("%s: %s", w.name, result.ForbiddenDetail())
		}
	}
	if judged != 2 {
		t.Errorf("%d workloads are restricted", judged)
	}
}

// TestRolesNameWhatTheyAllow refuses wildcards, and what makes more of a permission than it says.
func TestRolesNameWhatTheyAllow(t *testing.T) {
	roles := 0
	for _, dir := range overlays(t) {
		for _, o := range typed(t, kustomize(t, dir)) {
			var rules []rbacv1.PolicyRule
			var name string
			switch o := o.(type) {
			case *rbacv1.Role:
				rules, name = o.Rules, "Role "+o.Namespace+"/"+o.Name
			case *rbacv1.ClusterRole:
				rules, name = o.Rules, "ClusterRole "+o.Name
			default:
				continue
			}
			roles++
			for _, r := range rules {
				for _, word := range slices.Concat(r.APIGroups, r.Resources, r.Verbs, r.ResourceNames, r.NonResourceURLs) {
					if strings.Contains(word, "*") || slices.Contains([]string{"escalate", "bind", "impersonate", "nodes/proxy", "pods/exec", "serviceaccounts/token"}, word) {
						t.Errorf("%s allows %q", name, word)
					}
				}
				secrets := slices.Contains(r.Resources, "secrets")
				if secrets && strings.HasPrefix(name, "ClusterRole") {
					t.Errorf("%s reads the Secrets of all namespaces", name)
				}
				if secrets && strings.HasPrefix(name, "Role hearth-system/") && len(r.ResourceNames) == 0 && !slices.Equal(r.Verbs, []string{"create"}) {
					t.Errorf("%s: %v of any Secret beside the daemons", name, r.Verbs)
				}
			}
		}
	}
	if roles < 5 {
		t.Errorf("%d roles", roles)
	}
}

// TestReferencesHold follows what objects say of each other by name.
func TestReferencesHold(t *testing.T) {
	for _, dir := range overlays(t) {
		objects := typed(t, kustomize(t, dir))
		for _, w := range workloads(objects) {
			where := dir + ": " + w.name
			for k, v := range w.selector.MatchLabels {
				if w.template.Labels[k] != v {
					t.Errorf("%s does not select its own pods", where)
				}
			}
			spec, volumes := &w.template.Spec, map[string]bool{}
			for _, v := range spec.Volumes {
				volumes[v.Name] = true
			}
			for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
				if c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() || c.Resources.Limits.Memory().IsZero() {
					t.Errorf("%s: container %s does not say what it needs", where, c.Name)
				}
				for _, m := range c.VolumeMounts {
					if !volumes[m.Name] {
						t.Errorf("%s: container %s mounts %q, which is no volume", where, c.Name, m.Name)
					}
				}
				ports := map[string]bool{}
				for _, p := range c.Ports {
					ports[p.Name] = true
				}
				for _, p := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe} {
					if p != nil && !ports[p.HTTPGet.Port.StrVal] {
						t.Errorf("%s: container %s is probed at %s, which is no port", where, c.Name, p.HTTPGet.Port.String())
					}
				}
			}
			if dir != "base" {
				continue
			}
			if want := spec.ServiceAccountName; !has[*corev1.ServiceAccount](objects, w.namespace, want) {
				t.Errorf("%s: there is no ServiceAccount %s", where, want)
			}
			if class := spec.PriorityClassName; !strings.HasPrefix(class, "system-") && !slices.ContainsFunc(objects, func(o runtime.Object) bool { return named(o, "", class) }) {
				t.Errorf("%s: there is no PriorityClass %s", where, class)
			}
		}
		for _, o := range objects {
			if s, ok := o.(*corev1.Service); ok {
				checkService(t, dir, s, objects)
			}
			if b, ok := o.(*rbacv1.RoleBinding); ok && !has[*rbacv1.Role](objects, b.Namespace, b.RoleRef.Name) {
				t.Errorf("%s: RoleBinding %s/%s is to no Role", dir, b.Namespace, b.Name)
			}
		}
	}
}

func named(o runtime.Object, namespace, name string) bool {
	m, ok := o.(metav1.Object)
	return ok && m.GetNamespace() == namespace && m.GetName() == name
}

func has[T runtime.Object](objects []runtime.Object, namespace, name string) bool {
	return slices.ContainsFunc(objects, func(o runtime.Object) bool {
		_, ok := o.(T)
		return ok && named(o, namespace, name)
	})
}

// checkService finds somebody behind each port.
func checkService(t *testing.T, dir string, s *corev1.Service, objects []runtime.Object) {
	t.Helper()
	for _, p := range s.Spec.Ports {
		behind := 0
		for _, w := range workloads(objects) {
			for k, v := range s.Spec.Selector {
				if w.template.Labels[k] != v {
					w.template = nil
					break
				}
			}
			if w.template == nil {
				continue
			}
			for _, c := range w.template.Spec.Containers {
				if slices.ContainsFunc(c.Ports, func(has corev1.ContainerPort) bool { return has.Name == p.TargetPort.StrVal }) {
					behind++
				}
			}
		}
		if behind == 0 {
			t.Errorf("%s: nobody is behind port %s of Service %s", dir, p.Name, s.Name)
		}
	}
}

// TestArgumentsAreFlags asks each daemon for the flags that it is given.
func TestArgumentsAreFlags(t *testing.T) {
	dir := t.TempDir()
	command := exec.Command("go", "build", "-o", dir, "../cmd/nodeagent", "../cmd/poolmanager", "../cmd/gateway")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	asked := 0
	for _, where := range overlays(t) {
		for _, w := range workloads(typed(t, kustomize(t, where))) {
			for _, c := range slices.Concat(w.template.Spec.InitContainers, w.template.Spec.Containers) {
				_, program, _ := strings.Cut(c.Image, "hearth/")
				program, _, _ = strings.Cut(program, ":")
				if program == "pause" {
					if len(c.Args) > 0 {
						t.Errorf("%s: pause takes no arguments", where)
					}
					continue
				}
				asked++
				checkArguments(t, filepath.Join(dir, program), c)
			}
		}
	}
	if asked < 5 {
		t.Errorf("%d containers", asked)
	}
}

func checkArguments(t *testing.T, program string, c corev1.Container) {
	t.Helper()
	name, args := filepath.Base(program), slices.Clone(c.Args)
	for _, e := range c.Env { // each flag can be set by HEARTH_FLAG too
		if flag, ok := strings.CutPrefix(e.Name, "HEARTH_"); ok {
			args = append(args, "--"+strings.ToLower(strings.ReplaceAll(flag, "_", "-"))+"="+e.Value)
		}
	}
	command := []string{"--help"}
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command = []string{args[0], "--help"}
		args = args[1:]
	}
	help, err := exec.Command(program, command...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, command, err, help)
	}
	for _, a := range args {
		flag, _, _ := strings.Cut(a, "=")
		if !strings.Contains(string(help), " "+flag+" ") {
			t.Errorf("container %s gets %s, which %s does not know", c.Name, a, name)
		}
		for _, v := range regexp.MustCompile(`\$\(([A-Z_]+)\)`).FindAllStringSubmatch(a, -1) {
			if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == v[1] }) {
				t.Errorf("container %s gets %s, and has no %s", c.Name, a, v[1])
			}
		}
	}
}

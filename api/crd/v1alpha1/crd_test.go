package v1alpha1_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

const generated = "../../../deploy/crds"

// definition is a kind as an API server has it.
type definition struct {
	schema    *schema.Structural
	validator validation.SchemaValidator
	rules     *cel.Validator
}

// definitions reads what is generated, and refuses what an API server would.
func definitions(t testing.TB) map[string]*definition {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(generated, "hearth.dev_*.yaml"))
	if err != nil || len(files) != 4 {
		t.Fatalf("%s has %v (%v), not four kinds", generated, files, err)
	}
	out := map[string]*definition{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var external apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(data, &external); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		apiextensionsv1.SetDefaults_CustomResourceDefinition(&external)
		apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&external.Spec)
		external.Status.StoredVersions = []string{"v1alpha1"}
		var def apiextensions.CustomResourceDefinition
		if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(&external, &def, nil); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if errs := crdvalidation.ValidateCustomResourceDefinition(t.Context(), &def); len(errs) > 0 {
			t.Fatalf("%s: %v", file, errs.ToAggregate())
		}
		whole := def.Spec.Validation
		if whole == nil {
			whole = def.Spec.Versions[0].Schema
		}
		structural, err := schema.NewStructural(whole.OpenAPIV3Schema)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		validator, _, err := validation.NewSchemaValidator(whole.OpenAPIV3Schema)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		out[def.Spec.Names.Kind] = &definition{structural, validator, cel.NewValidator(structural, true, celconfig.PerCallLimit)}
	}
	return out
}

// admit does to an object what an API server does when it is created, or changed from old: defaults, then all rules.
func (d *definition) admit(t testing.TB, object, old map[string]any) field.ErrorList {
	t.Helper()
	defaulting.Default(object, d.schema)
	errs := validation.ValidateCustomResource(nil, object, d.validator)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, d.schema, object)...)
	var before any
	if old != nil {
		before = old
	}
	ruled, _ := d.rules.Validate(t.Context(), nil, d.schema, object, before, celconfig.RuntimeCELCostBudget)
	return append(errs, ruled...)
}

func object(t testing.TB, kind, name, spec string) map[string]any {
	t.Helper()
	data, err := yaml.YAMLToJSON([]byte(spec))
	if err != nil {
		t.Fatalf("%s: %v", spec, err)
	}
	var parsed any
	if err := utiljson.Unmarshal(data, &parsed); err != nil { // numbers as an API server has them
		t.Fatalf("%s: %v", spec, err)
	}
	return map[string]any{"apiVersion": "hearth.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": parsed}
}

const (
	digest   = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	code     = `code: {package: "r.example/code/hello@` + digest + `", handler: main.hello}`
	maxLabel = "a123456789012345678901234567890123456789" // 40 bytes
)

func TestGoodObjectsPass(t *testing.T) {
	defs := definitions(t)
	for _, c := range []struct{ name, kind, as, spec string }{
		{"image", "Function", "hello", `{image: "r.example/hello:1"}`},
		{"longest name", "Function", maxLabel, `{image: hello}`},
		{"shortest name", "Function", "h", `{image: hello}`},
		{"all of an image", "Function", "hello", `
image: r.example/hello@` + digest + `
port: 9000
env: [{name: LEVEL, value: debug}, {name: EMPTY}]
command: [python, ""]
args: [app.py]
scaling: {concurrency: 1, min: 2, max: 2, window: 1m30s, grace: 0s, queue: 1, frozen: 0}
hosts: [www.example.org, localhost]
timeout: 1h
resources: {cpu: 500m, memory: 128Mi}
secrets: [{name: api-key, secretKeyRef: {name: keys, key: api}}]
tenant: acme
writableRoot: true`},
		{"numbers as quantities", "Function", "hello", `{image: hello, resources: {cpu: 2, memory: 134217728}}`},
		{"fractions", "Function", "hello", `{image: hello, resources: {cpu: "0.5"}, timeout: 1.5s}`},
		{"code", "Function", "hello", `{runtime: python, ` + code + `}`},
		{"code of a group", "Function", "hello", `{runtime: python, group: team, ` + code + `}`},
		{"empty command in a runtime", "Function", "hello", `{runtime: python, command: [], writableRoot: false, ` + code + `}`},
		{"nothing handled", "Function", "hello", `{runtime: native, code: {package: "hello@` + digest + `", signature: cloudevent}}`},
		{"an image's version", "Revision", "hello-00001", `{function: hello, image: hello, port: 8080, concurrency: 10, secretName: hello-00001}`},
		{"code's version", "Revision", "hello-00002", `{function: hello, runtime: python, ` + code + `}`},
		{"runtime", "Runtime", "python", `{image: "r.example/python:1", preload: [numpy, "com.example.Größe"], env: [{name: A, value: b}]}`},
		{"sandboxes", "WarmPool", "all", `{}`},
		{"pool", "WarmPool", "python", `
runtime: python
size: 0
nodeSelector: {zone: a}
tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]
resources: {cpu: 100m, memory: 64Mi}
images: ["r.example/hello:1"]
headroom: 2`},
	} {
		t.Run(c.kind+"/"+c.name, func(t *testing.T) {
			o := object(t, c.kind, c.as, c.spec)
			if errs := defs[c.kind].admit(t, o, nil); len(errs) > 0 {
				t.Error(errs.ToAggregate())
			}
			if unknown := pruning.PruneWithOptions(o, defs[c.kind].schema, true, schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}); len(unknown) > 0 {
				t.Errorf("unknown fields %v", unknown)
			}
			if errs := defs[c.kind].admit(t, o, o); len(errs) > 0 {
				t.Errorf("unchanged: %v", errs.ToAggregate())
			}
		})
	}
}

func TestBadObjectsAreRefusedWithASentence(t *testing.T) {
	defs := definitions(t)
	long := strings.Repeat("a", 41)
	for _, c := range []struct{ name, kind, as, spec, want string }{
		{"name too long", "Function", long, `{image: hello}`, "metadata.name: must be a DNS label (a-z, 0-9 and -) of at most 40 bytes"},
		{"name with a dot", "Function", "a.b", `{image: hello}`, "metadata.name: must be a DNS label"},
		{"name ends in -", "Function", "a-", `{image: hello}`, "metadata.name: must be a DNS label"},
		{"nothing", "Function", "hello", `{}`, "a function is either an image, or a runtime with code"},
		{"both", "Function", "hello", `{image: hello, runtime: python, ` + code + `}`, "a function is either an image, or a runtime with code, and not both"},
		{"image with code", "Function", "hello", `{image: hello, ` + code + `}`, "runtime and code belong together"},
		{"runtime without code", "Function", "hello", `{runtime: python}`, "runtime and code belong together"},
		{"blank in an image", "Function", "hello", `{image: "hello world"}`, "must be an image reference"},
		{"code by tag", "Function", "hello", `{runtime: python, code: {package: "code:1"}}`, "must be an image reference by digest"},
		{"code without a package", "Function", "hello", `{runtime: python, code: {handler: main.hello}}`, "spec.code.package: Required value"},
		{"handler", "Function", "hello", `{runtime: python, code: {package: "c@` + digest + `", handler: "a\nb"}}`, "must be printable; for example main.hello"},
		{"signature", "Function", "hello", `{runtime: python, code: {package: "c@` + digest + `", signature: grpc}}`, `Unsupported value: "grpc": supported values: "http", "cloudevent"`},
		{"runtime's name", "Function", "hello", `{runtime: "Python 3", ` + code + `}`, "spec.runtime: Invalid value"},
		{"command in a runtime", "Function", "hello", `{runtime: python, command: [python], ` + code + `}`, "command and args belong to an image"},
		{"args in a runtime", "Function", "hello", `{runtime: python, args: [a], ` + code + `}`, "command and args belong to an image"},
		{"writable root in a runtime", "Function", "hello", `{runtime: python, writableRoot: true, ` + code + `}`, "writableRoot belongs to an image"},
		{"port in a group", "Function", "hello", `{image: hello, group: team, port: 8080}`, "port cannot be chosen in a pod that a group shares"},
		{"group", "Function", "hello", `{image: hello, group: ` + long + `}`, "spec.group: Invalid value"},
		{"tenant", "Function", "hello", `{image: hello, tenant: A}`, "spec.tenant: Invalid value"},
		{"port", "Function", "hello", `{image: hello, port: 70000}`, "spec.port: Invalid value: 70000"},
		{"min over max", "Function", "hello", `{image: hello, scaling: {min: 3, max: 2}}`, "min is more than max"},
		{"min over the default max", "Function", "hello", `{image: hello, scaling: {min: 11}}`, "min is more than max, which is 10 if it is left out"},
		{"negative min", "Function", "hello", `{image: hello, scaling: {min: -1}}`, "spec.scaling.min: Invalid value"},
		{"max", "Function", "hello", `{image: hello, scaling: {max: 10001}}`, "spec.scaling.max: Invalid value"},
		{"no concurrency", "Function", "hello", `{image: hello, scaling: {concurrency: 0}}`, "spec.scaling.concurrency: Invalid value"},
		{"no queue", "Function", "hello", `{image: hello, scaling: {queue: 0}}`, "spec.scaling.queue: Invalid value"},
		{"frozen", "Function", "hello", `{image: hello, scaling: {frozen: -1}}`, "spec.scaling.frozen: Invalid value"},
		{"timeout", "Function", "hello", `{image: hello, timeout: 61m}`, "must be a duration from 0s to 1h; for example 60s"},
		{"a timeout that is none", "Function", "hello", `{image: hello, timeout: a minute}`, "must be a duration from 0s to 1h"},
		{"a timeout that overflows", "Function", "hello", `{image: hello, timeout: 999999999h}`, "spec.timeout: Invalid value"},
		{"negative window", "Function", "hello", `{image: hello, scaling: {window: -1s}}`, "must be a duration from 0s to 1h"},
		{"grace", "Function", "hello", `{image: hello, scaling: {grace: 2h}}`, "must be a duration from 0s to 1h"},
		{"no cpu", "Function", "hello", `{image: hello, resources: {cpu: 0}}`, "must be more than 0"},
		{"negative memory", "Function", "hello", `{image: hello, resources: {memory: -1Mi}}`, "must be at least a byte"},
		{"memory that is none", "Function", "hello", `{image: hello, resources: {memory: much}}`, "spec.resources.memory: Invalid value"},
		{"endless memory", "Function", "hello", `{image: hello, resources: {memory: 9e99}}`, "must be at least a byte"},
		{"a variable's name", "Function", "hello", `{image: hello, env: [{name: "A=B", value: c}]}`, "must be a variable's name, without ="},
		{"a variable twice", "Function", "hello", `{image: hello, env: [{name: A, value: b}, {name: A, value: c}]}`, "Duplicate value"},
		{"a variable's value", "Function", "hello", `{image: hello, env: [{name: A, value: "\0"}]}`, "should match '^[^\\x00]*$'"},
		{"args", "Function", "hello", `{image: hello, args: ["\0"]}`, "should match '^[^\\x00]*$'"},
		{"host in capitals", "Function", "hello", `{image: hello, hosts: [Example.org]}`, "must be a host name in lower case"},
		{"host with a port", "Function", "hello", `{image: hello, hosts: ["example.org:80"]}`, "must be a host name in lower case and without a port"},
		{"host twice", "Function", "hello", `{image: hello, hosts: [a, a]}`, "Duplicate value"},
		{"secret's file", "Function", "hello", `{image: hello, secrets: [{name: ../x, secretKeyRef: {name: a, key: b}}]}`, "must be a file name of letters"},
		{"secret above", "Function", "hello", `{image: hello, secrets: [{name: .., secretKeyRef: {name: a, key: b}}]}`, "must be a file name of letters"},
		{"secret from nowhere", "Function", "hello", `{image: hello, secrets: [{name: a}]}`, "spec.secrets[0].secretKeyRef: Required value"},
		{"revision of nothing", "Revision", "hello-00001", `{image: hello}`, "spec.function: Required value"},
		{"revision of both", "Revision", "hello-00001", `{function: hello, image: hello, runtime: python, ` + code + `}`, "a revision is either an image, or a runtime with code"},
		{"runtime without an image", "Runtime", "python", `{}`, "spec.image: Required value"},
		{"runtime's long name", "Runtime", long, `{image: a}`, "metadata.name: must be a DNS label"},
		{"library with a comma", "Runtime", "python", `{image: a, preload: ["a,b"]}`, "must be a library's name"},
		{"library with a line", "Runtime", "python", `{image: a, preload: ["a\nb"]}`, "must be a library's name"},
		{"pool's size", "WarmPool", "all", `{size: -1}`, "spec.size: Invalid value"},
		{"pool of too many", "WarmPool", "all", `{size: 1001}`, "spec.size: Invalid value"},
		{"pool's image", "WarmPool", "all", `{images: [" "]}`, "must be an image reference"},
		{"pool's runtime", "WarmPool", "all", `{runtime: -}`, "spec.runtime: Invalid value"},
		{"pool's headroom", "WarmPool", "all", `{headroom: -1}`, "spec.headroom: Invalid value"},
		{"pool's name", "WarmPool", "a.b", `{}`, "metadata.name: must be a DNS label"},
	} {
		t.Run(c.kind+"/"+c.name, func(t *testing.T) {
			errs := defs[c.kind].admit(t, object(t, c.kind, c.as, c.spec), nil)
			if said := fmt.Sprint(errs.ToAggregate()); !strings.Contains(said, c.want) {
				t.Errorf("said %q, want %q in it", said, c.want)
			}
		})
	}
}

func TestARevisionNeverChanges(t *testing.T) {
	d := definitions(t)["Revision"]
	before := object(t, "Revision", "hello-00001", `{function: hello, image: hello, env: [{name: A, value: b}]}`)
	after := object(t, "Revision", "hello-00001", `{function: hello, image: hello, env: [{name: A, value: c}]}`)
	if said := fmt.Sprint(d.admit(t, after, before).ToAggregate()); !strings.Contains(said, "a revision never changes; change the function") {
		t.Errorf("said %q", said)
	}
	after = object(t, "Revision", "hello-00001", `{function: hello, image: hello, env: [{name: A, value: b}]}`)
	after["status"] = map[string]any{"image": "hello@" + digest}
	if errs := d.admit(t, after, before); len(errs) > 0 {
		t.Errorf("a status alone: %v", errs.ToAggregate())
	}
}

func TestDefaults(t *testing.T) {
	defs := definitions(t)
	o := object(t, "Function", "hello", `{runtime: python, code: {package: "c@`+digest+`"}}`)
	if errs := defs["Function"].admit(t, o, nil); len(errs) > 0 {
		t.Fatal(errs.ToAggregate())
	}
	var f crd.Function
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o, &f, true); err != nil {
		t.Fatal(err)
	}
	s := f.Spec.Scaling
	if s.Concurrency != 10 || s.Min != 0 || s.Max != 10 || s.Window.Duration.String() != "1m0s" || s.Grace.Duration.String() != "30s" ||
		s.Queue != 1000 || *s.Frozen != 1 || f.Spec.Timeout.Duration.String() != "1m0s" || f.Spec.Code.Signature != crd.SignatureHTTP {
		t.Errorf("defaults are %+v, timeout %v, signature %v", s, f.Spec.Timeout, f.Spec.Code.Signature)
	}
	o = object(t, "WarmPool", "all", `{}`)
	defaulting.Default(o, defs["WarmPool"].schema)
	if size, _ := o["spec"].(map[string]any)["size"].(int64); size != 3 {
		t.Errorf("a pool's size is %v", o["spec"])
	}
}

// What passes as a Function has to be readable as one: a single object that is not would blind whoever lists them.
func FuzzFunction(f *testing.F) {
	f.Add([]byte(`{"image":"hello","timeout":"1.5s","resources":{"cpu":"1e3","memory":"1Ki"}}`))
	f.Add([]byte(`{"runtime":"python","code":{"package":"c@` + digest + `"},"scaling":{"window":"1h"}}`))
	f.Add([]byte(`{"image":"hello","timeout":"1h1h1µs","resources":{"cpu":".5","memory":12}}`))
	d := definitions(f)["Function"]
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec map[string]any
		if utiljson.Unmarshal(data, &spec) != nil {
			return
		}
		o := map[string]any{"apiVersion": "hearth.dev/v1alpha1", "kind": "Function", "metadata": map[string]any{"name": "hello"}, "spec": spec}
		pruning.Prune(o, d.schema, true)
		if len(d.admit(t, o, nil)) > 0 {
			return
		}
		admitted, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var read crd.Function
		if err := json.Unmarshal(admitted, &read); err != nil {
			t.Errorf("%s passed, and cannot be read: %v", admitted, err)
		}
	})
}

func TestKindsAreKnown(t *testing.T) {
	s := runtime.NewScheme()
	if err := crd.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	for kind := range definitions(t) {
		for _, k := range []string{kind, kind + "List"} {
			o, err := s.New(crd.GroupVersion.WithKind(k))
			if err != nil {
				t.Error(err)
			} else if _, ok := o.DeepCopyObject().(metav1.Object); ok != (k == kind) {
				t.Errorf("%T has an object's metadata: %v", o, ok)
			}
		}
	}
}

// TestGeneratedIsUpToDate: what lies in deploy/crds and beside the types is what the types say.
func TestGeneratedIsUpToDate(t *testing.T) {
	if testing.Short() {
		t.Skip("runs controller-gen")
	}
	fresh := t.TempDir()
	cmd := exec.Command("go", "tool", "controller-gen", "object", "crd", "paths=.", "output:crd:dir="+fresh, "output:object:dir="+fresh)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files, err := os.ReadDir(fresh)
	if err != nil || len(files) != 5 {
		t.Fatalf("controller-gen made %v (%v)", files, err)
	}
	for _, f := range files {
		have := filepath.Join(generated, f.Name())
		if strings.HasSuffix(f.Name(), ".go") {
			have = f.Name()
		}
		want, err := os.ReadFile(filepath.Join(fresh, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(have); err != nil || string(got) != string(want) {
			t.Errorf("%s is not what the types say (%v); run `make generate`", have, err)
		}
	}
}

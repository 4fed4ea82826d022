package kube_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/kube"
)

func image() *hearthv1.FunctionSpec {
	return &hearthv1.FunctionSpec{
		Image: "r.example/hello:1", Port: 9000, Env: map[string]string{"A": "b", "EMPTY": ""}, Command: []string{"python", ""}, Args: []string{"app.py"},
		Scaling: &hearthv1.Scaling{Concurrency: 3, Min: 1, Max: 4, Window: durationpb.New(90 * time.Second), Grace: durationpb.New(0), Queue: 7, Frozen: -1},
		Hosts:   []string{"www.example.org"}, Timeout: durationpb.New(time.Second), Resources: &hearthv1.Resources{MemoryBytes: 1<<27 + 1, CpuMillis: 1250},
		Secrets: map[string][]byte{"key": []byte("v"), "other": {0}}, Tenant: "acme", WritableRoot: true,
	}
}

func code() *hearthv1.FunctionSpec {
	return &hearthv1.FunctionSpec{Runtime: "python", Group: "team", Scaling: &hearthv1.Scaling{Concurrency: 10, Frozen: 2},
		Code: &hearthv1.Code{Package: "c@sha256:0", Handler: "main.hello", Signature: hearthv1.Signature_SIGNATURE_CLOUDEVENT}}
}

func TestSpecsComeBack(t *testing.T) {
	for _, want := range []*hearthv1.FunctionSpec{image(), code()} {
		resource := kube.FunctionResource(want, "all")
		got := kube.FunctionSpec(&resource, want.GetSecrets())
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for _, s := range resource.Secrets {
			if s.SecretKeyRef != (crd.SecretKeyRef{Name: "all", Key: s.Name}) {
				t.Errorf("secret %s is from %v", s.Name, s.SecretKeyRef)
			}
		}
	}
}

// revisionOf makes a Revision as the pool does.
func revisionOf(f *hearthv1.FunctionSpec) *hearthv1.Revision {
	r := &hearthv1.Revision{Name: "hello-00001", Function: "hello", Image: f.GetImage(), Port: f.GetPort(), Env: f.GetEnv(), Command: f.GetCommand(),
		Args: f.GetArgs(), Resources: f.GetResources(), Code: f.GetCode(), Secrets: f.GetSecrets(), Concurrency: f.GetScaling().GetConcurrency(),
		Tenant: f.GetTenant(), Group: f.GetGroup(), WritableRoot: f.GetWritableRoot()}
	if f.GetRuntime() != "" {
		r.Runtime = &hearthv1.Runtime{Name: f.GetRuntime()}
	}
	if r.Port == 0 {
		r.Port = 8080
	}
	return r
}

func TestRevisionsComeBack(t *testing.T) {
	for _, spec := range []*hearthv1.FunctionSpec{image(), code()} {
		want := revisionOf(spec)
		stored := &crd.Revision{ObjectMeta: metav1.ObjectMeta{Name: want.GetName()}, Spec: kube.RevisionSpec(want, spec.GetImage(), want.GetName())}
		if diff := cmp.Diff(want, kube.Revision(stored, spec.GetSecrets()), protocmp.Transform()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if (stored.Spec.SecretName != "") != (len(spec.GetSecrets()) > 0) {
			t.Errorf("its Secret is %q", stored.Spec.SecretName)
		}

		// Read back by the next leader, the Function is as it was applied.
		function := kube.FunctionResource(spec, "all")
		if diff := cmp.Diff(spec, kube.AcceptedSpec(&function, stored, spec.GetSecrets()), protocmp.Transform()); diff != "" {
			t.Errorf("accepted: -want +got:\n%s", diff)
		}
		changed := function.DeepCopy()
		changed.Env = append(changed.Env, crd.EnvVar{Name: "NEW"})
		changed.Scaling.Concurrency++
		if accepted := kube.AcceptedSpec(changed, stored, spec.GetSecrets()); !proto.Equal(accepted, spec) {
			t.Errorf("a change that was not applied yet is taken for accepted: %v", accepted)
		}
	}
}

func TestAPinnedImageIsTheStatuss(t *testing.T) {
	r := revisionOf(image())
	stored := &crd.Revision{Spec: kube.RevisionSpec(r, "r.example/hello:1", "s"), Status: crd.RevisionStatus{Image: "r.example/hello@sha256:0"}}
	if got := kube.Revision(stored, nil).GetImage(); got != "r.example/hello@sha256:0" {
		t.Errorf("the image is %s", got)
	}
	r.Image = "r.example/hello@sha256:0"
	if again := kube.RevisionSpec(r, "r.example/hello:1", "s"); !cmp.Equal(again, stored.Spec) {
		t.Errorf("the spec changed: %s", cmp.Diff(stored.Spec, again))
	}
}

func TestRuntimesComeBack(t *testing.T) {
	want := &hearthv1.Runtime{Name: "python", Image: "r.example/python:1", Preload: []string{"numpy"}, Env: map[string]string{"A": "b"}}
	r := &crd.Runtime{ObjectMeta: metav1.ObjectMeta{Name: "python"}, Spec: kube.RuntimeResource(want)}
	if diff := cmp.Diff(want, kube.RuntimeMessage(r), protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Whatever is in a resource, converting it twice changes nothing more: or a Function would get a new Revision with every look at it.
func FuzzConvert(f *testing.F) {
	f.Add([]byte(`{"image":"hello","port":1,"env":[{"name":"A","value":"b"},{"name":"A"}],"scaling":{"frozen":0,"window":"1m0.5s"},"resources":{"cpu":"1n","memory":"0.5"}}`))
	f.Add([]byte(`{"runtime":"python","code":{"package":"a","signature":"?"},"group":"g","timeout":"-1h","secrets":[{"name":"a","secretKeyRef":{"name":"b","key":"c"}}]}`))
	f.Add([]byte(`{"resources":{"cpu":"9e99","memory":"-9e99"},"scaling":{"frozen":-7},"args":["",""]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var resource crd.FunctionSpec
		if json.Unmarshal(data, &resource) != nil {
			return
		}
		secrets := map[string][]byte{}
		for _, s := range resource.Secrets {
			secrets[s.Name] = []byte(s.SecretKeyRef.Key)
		}
		once := kube.FunctionSpec(&resource, secrets)
		again := kube.FunctionResource(once, "all")
		twice := kube.FunctionSpec(&again, secrets)
		if !proto.Equal(once, twice) {
			t.Errorf("%s: %s", data, cmp.Diff(once, twice, protocmp.Transform()))
		}
		revision := revisionOf(once)
		stored := &crd.Revision{ObjectMeta: metav1.ObjectMeta{Name: revision.GetName()}, Spec: kube.RevisionSpec(revision, once.GetImage(), "s")}
		if got := kube.Revision(stored, secrets); !cmp.Equal(revision, got, protocmp.Transform(), cmpopts.EquateEmpty()) && once.GetCode() != nil == (once.GetRuntime() != "") {
			said, _ := protojson.Marshal(got)
			t.Errorf("%s: revision came back as %s", data, said)
		}
	})
}

package kube

import (
	"testing"

	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	poolstore "github.com/hearth-serverless/hearth/pool/store"
)

func recordsOver(t *testing.T) (*records, client.Client) {
	t.Helper()
	api := fake.NewClientBuilder().WithScheme(NewScheme()).WithStatusSubresource(&crd.Revision{}).WithObjects(
		&crd.Function{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "f", UID: "one"}, Spec: crd.FunctionSpec{Image: "r/f:1"}},
		&crd.Runtime{ObjectMeta: metav1.ObjectMeta{Namespace: "hearth", Name: "python"}, Spec: crd.RuntimeSpec{Image: "r/python:1"}}).Build()
	return newRecords(t.Context(), api, api, "hearth", &Term{Epoch: 7}), api
}

func first(secret string) poolstore.Record {
	r := &hearthv1.Revision{Name: "f-00001", Function: "f", Image: "r/f:1", Port: 8080, Concurrency: 10, Secrets: map[string][]byte{"key": []byte(secret)}}
	spec := &hearthv1.FunctionSpec{Image: "r/f:1", Port: 8080, Secrets: r.Secrets, Scaling: &hearthv1.Scaling{Concurrency: 10}}
	return poolstore.Record{Name: "f", Serial: 1, Revision: r, Function: &hearthv1.Function{Name: "f", Spec: spec}}
}

func only(t *testing.T, s *records) poolstore.Record {
	t.Helper()
	all, err := s.Records()
	if err != nil || len(all) != 1 {
		t.Fatalf("%v, %v; want one record", all, err)
	}
	return all[0]
}

// TestRecords: what is put is read by the next term, with secrets and the resolved image; a name keeps its serial beyond its Function.
func TestRecords(t *testing.T) {
	s, api := recordsOver(t)
	if epoch, err := s.BeginTerm(0); epoch != 7 || err != nil {
		t.Errorf("term %d, %v; want the Lease's", epoch, err)
	}
	r := first("secret")
	if err := s.Put(r); err != nil {
		t.Fatal(err)
	}
	if got := only(t, s); got.Serial != 1 || !proto.Equal(got.Revision, r.Revision) || !proto.Equal(got.Function.GetSpec(), r.Function.GetSpec()) {
		t.Errorf("read %v, want %v", got, r)
	}
	r.Revision.Image = "r/f@sha256:1"
	if err := s.Put(r); err != nil {
		t.Fatal(err)
	}
	if got := only(t, s); got.Revision.GetImage() != "r/f@sha256:1" || got.Function.GetSpec().GetImage() != "r/f:1" {
		t.Errorf("read %v, want the image by digest", got)
	}
	other := first("secret")
	other.Revision.Env = map[string]string{"A": "B"}
	if s.Put(other) == nil {
		t.Error("a revision was changed")
	}
	for _, o := range []client.Object{&crd.Function{}, &crd.Revision{}} { // garbage collection may be the first to hear of it
		if err := api.DeleteAllOf(t.Context(), o, client.InNamespace("hearth")); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete("f"); err != nil {
		t.Fatal(err)
	}
	if got := only(t, s); got.Serial != 1 || got.Function != nil {
		t.Errorf("read %v of a deleted function, want its serial", got)
	}
}

// TestChangedWhileNobodyLed: the record is what was accepted, so that what was applied meanwhile is seen to differ.
func TestChangedWhileNobodyLed(t *testing.T) {
	s, api := recordsOver(t)
	if err := s.Put(first("secret")); err != nil {
		t.Fatal(err)
	}
	var f crd.Function
	if err := api.Get(t.Context(), types.NamespacedName{Namespace: "hearth", Name: "f"}, &f); err != nil {
		t.Fatal(err)
	}
	f.Spec.Image = "r/f:2"
	if err := api.Update(t.Context(), &f); err != nil {
		t.Fatal(err)
	}
	if got := only(t, s); got.Function.GetSpec().GetImage() != "r/f:1" {
		t.Errorf("read image %s, want the one that was accepted", got.Function.GetSpec().GetImage())
	}
}

// TestRuntimeGenerations: a generation is never used for two specs, over terms and deletions.
func TestRuntimeGenerations(t *testing.T) {
	s, api := recordsOver(t)
	generation := func() int64 {
		t.Helper()
		all, err := s.Runtimes()
		if err != nil || len(all) != 1 {
			t.Fatalf("%v, %v", all, err)
		}
		return all[0].Generation
	}
	if n := generation(); n != 1 {
		t.Errorf("generation %d, want 1", n)
	}
	applied := &hearthv1.Runtime{Name: "python", Image: "r/python:1", Generation: 4}
	if err := s.PutRuntime(poolstore.Runtime{Name: "python", Generation: 4, Applied: applied, Image: "r/python@sha256:1"}); err != nil {
		t.Fatal(err)
	}
	if n := generation(); n != 4 {
		t.Errorf("generation %d, want 4", n)
	}
	var r crd.Runtime
	if err := api.Get(t.Context(), types.NamespacedName{Namespace: "hearth", Name: "python"}, &r); err != nil {
		t.Fatal(err)
	}
	r.Spec.Image = "r/python:2"
	if err := api.Update(t.Context(), &r); err != nil {
		t.Fatal(err)
	}
	if n := generation(); n != 5 {
		t.Errorf("generation %d of a changed spec, want 5", n)
	}
	if err := s.PutRuntime(poolstore.Runtime{Name: "python", Generation: 5}); err != nil {
		t.Fatal(err)
	}
	if err := api.Delete(t.Context(), &r); err != nil {
		t.Fatal(err)
	}
	if n := generation(); n != 5 {
		t.Errorf("generation %d of a deleted runtime, want 5", n)
	}
}

// FuzzAccepted: whatever is on a Runtime is a note of ours or none.
func FuzzAccepted(f *testing.F) {
	f.Add(`{"generation":3,"spec":"a"}`)
	f.Add(`{"generation":-3}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, note string) {
		r := &crd.Runtime{}
		r.Annotations = map[string]string{acceptedAnnotation: note}
		if got := acceptedOf(r, 2); got.Generation < 1 || got.Generation > maxEpoch {
			t.Errorf("%q is generation %d", note, got.Generation)
		}
	})
}

package pool_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

func FuzzValidate(f *testing.F) {
	for _, fn := range []*hearthv1.Function{
		{},
		{Name: "hello", Spec: &hearthv1.FunctionSpec{Image: "registry.example/hello:1"}},
		{Name: "Hello-", Spec: &hearthv1.FunctionSpec{Port: -1, Hosts: []string{"", "a..b"}, Env: map[string]string{"": "x"}}},
		{Name: "a", Spec: &hearthv1.FunctionSpec{Runtime: "python", Code: &hearthv1.Code{Package: "a@sha256:b", Handler: "main.x"}, Secrets: map[string][]byte{"a": {0}}}},
		{Name: "a", Spec: &hearthv1.FunctionSpec{Image: "a b", Timeout: seconds(-1), Scaling: &hearthv1.Scaling{Min: 3, Max: 2, Window: seconds(1 << 40)}}},
	} {
		b, err := proto.Marshal(fn)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		fn := &hearthv1.Function{}
		if proto.Unmarshal(b, fn) != nil || pool.Validate(fn.GetName(), fn.GetSpec()) != nil {
			return
		}
		s := fn.GetSpec()
		if fn.GetName() == "" || len(fn.GetName()) > 40 || (s.GetImage() == "") == (s.GetRuntime() == "") || (s.GetRuntime() == "") != (s.GetCode() == nil) || s.GetPort() < 0 || s.GetPort() > 65535 ||
			s.GetScaling().GetMax() > 0 && s.GetScaling().GetMin() > s.GetScaling().GetMax() || s.GetTimeout().AsDuration() < 0 {
			t.Errorf("accepted %v", fn)
		}
	})
}

func FuzzValidateRuntime(f *testing.F) {
	for _, r := range []*hearthv1.Runtime{{}, {Name: "python", Image: "a", Preload: []string{"numpy"}, Warm: 2}, {Name: "A", Warm: -1, Preload: []string{","}}} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &hearthv1.Runtime{}
		if proto.Unmarshal(b, r) != nil || pool.ValidateRuntime(r) != nil {
			return
		}
		if r.GetName() == "" || r.GetImage() == "" || r.GetWarm() < 0 || strings.ContainsAny(strings.Join(r.GetPreload(), ""), ",\n") {
			t.Errorf("accepted %v", r)
		}
	})
}

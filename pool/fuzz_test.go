package pool_test

import (
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
		if fn.GetName() == "" || len(fn.GetName()) > 40 || s.GetImage() == "" || s.GetPort() < 0 || s.GetPort() > 65535 ||
			s.GetScaling().GetMax() > 0 && s.GetScaling().GetMin() > s.GetScaling().GetMax() || s.GetTimeout().AsDuration() < 0 {
			t.Errorf("accepted %v", fn)
		}
	})
}

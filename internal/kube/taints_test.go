package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

func tainted(keys ...string) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}}
	for _, key := range keys {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule})
	}
	return node
}

func keysOf(node *corev1.Node) (keys []string) {
	for _, taint := range node.Spec.Taints {
		keys = append(keys, taint.Key)
	}
	return keys
}

func TestUntaint(t *testing.T) {
	for name, tt := range map[string]struct {
		seen, there []string // in poolmanager's cache, and in the API server
		connected   bool
		removed     bool
		left        []string
		fails       bool
	}{
		"serves":         {seen: []string{"a", TaintNotReady, "b"}, there: []string{"a", TaintNotReady, "b"}, connected: true, removed: true, left: []string{"a", "b"}},
		"the only one":   {seen: []string{TaintNotReady}, there: []string{TaintNotReady}, connected: true, removed: true},
		"not connected":  {seen: []string{TaintNotReady}, there: []string{TaintNotReady}, left: []string{TaintNotReady}},
		"not tainted":    {seen: []string{"a"}, there: []string{"a"}, connected: true, left: []string{"a"}},
		"others came":    {seen: []string{TaintNotReady}, there: []string{TaintNotReady, "new"}, connected: true, removed: true, left: []string{"new"}},
		"others moved":   {seen: []string{TaintNotReady}, there: []string{"new", TaintNotReady}, connected: true, left: []string{"new", TaintNotReady}, fails: true},
		"others took it": {seen: []string{"a", TaintNotReady}, there: []string{"a"}, connected: true, left: []string{"a"}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			api := fake.NewClientBuilder().WithObjects(tainted(tt.there...)).Build()
			removed, err := untaint(t.Context(), api, tainted(tt.seen...), tt.connected)
			if removed != tt.removed || (err != nil) != tt.fails {
				t.Errorf("removed %v, error %v", removed, err)
			}
			var node corev1.Node
			if err := api.Get(t.Context(), client.ObjectKey{Name: "node-1"}, &node); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.left, keysOf(&node)); diff != "" {
				t.Error(diff)
			}
		})
	}
	if removed, err := untaint(t.Context(), fake.NewClientBuilder().Build(), tainted(TaintNotReady), true); removed || err != nil {
		t.Errorf("of a node that is gone: %v, %v", removed, err)
	}
}

package pool_test

import (
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// TestForgottenByItsNode: a node that was killed before it had recorded what an Instance serves ends it, and does not know whose it
// was. Gateways must not go on sending requests to where nobody is.
func TestForgottenByItsNode(t *testing.T) {
	bubble(t, func(t *testing.T, n *fakeNode, m *running) {
		m.apply("hello", nil)
		time.Sleep(time.Minute)
		g := m.gateway("g")
		defer g.leave()
		id := m.must("hello").GetInstance().GetId()
		settle()
		if got := g.serving("hello"); len(got) != 1 || got[0] != id {
			t.Fatalf("%v serve", got)
		}
		n.on(func() {
			i := n.instances[id]
			i.Function, i.Revision, i.Claim = "", "", nil
			n.set(i, hearthv1.State_STATE_DRAINING)
		})
		time.Sleep(time.Second)
		if got := g.serving("hello"); len(got) != 0 {
			t.Errorf("gateways know %v still", got)
		}
	})
}

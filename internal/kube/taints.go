package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TaintNotReady is what a node may be created with (the kubelet's --register-with-taints), so that no pod which wants Hearth comes to it
// before nodeagent serves there. An autoscaler knows it as a start-up taint.
const TaintNotReady = "hearth.dev/nodeagent-not-ready"

// untaint takes TaintNotReady from a node on which nodeagent serves: its pod is ready and poolmanager is connected with it. It reports
// whether there was something to take.
//
// Nobody puts it back. It is for the first minutes of a node; later, the pool itself knows which nodeagent is away and places nothing there,
// while a taint would keep off every other pod of the cluster too, at each upgrade of nodeagent, and at each fault of poolmanager's
// own network on all nodes at once.
func untaint(ctx context.Context, api client.Writer, node *corev1.Node, connected bool) (bool, error) {
	at := slices.IndexFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == TaintNotReady })
	if !connected || at < 0 {
		return false, nil
	}
	path := fmt.Sprintf("/spec/taints/%d", at)
	patch, err := json.Marshal([]map[string]any{ // the list is replaced as a whole otherwise, with what others have added meanwhile
		{"op": "test", "path": path + "/key", "value": TaintNotReady},
		{"op": "remove", "path": path},
	})
	if err != nil {
		return false, err
	}
	err = api.Patch(ctx, &corev1.Node{ObjectMeta: node.ObjectMeta}, client.RawPatch(types.JSONPatchType, patch))
	switch {
	case apierrors.IsNotFound(err): // the node is gone
		return false, nil
	case err != nil: // also if the taints are others by now: the next event of the node tells
		return false, fmt.Errorf("take taint %s from node %s: %w", TaintNotReady, node.Name, err)
	}
	return true, nil
}

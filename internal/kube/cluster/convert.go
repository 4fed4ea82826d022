package cluster

import (
	"google.golang.org/protobuf/types/known/timestamppb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/kube"
)

// Labels that are not Hearth's alone. The daemons' pods have the name hearth and a component each.
const (
	managedBy      = "app.kubernetes.io/managed-by"
	nameLabel      = "app.kubernetes.io/name"
	componentLabel = "app.kubernetes.io/component"
)

// daemonsName is the daemons' name by nameLabel.
const daemonsName = "hearth"

// The daemons, by componentLabel, and as their DaemonSet and Deployments are called.
const (
	nodeagent   = "nodeagent"
	poolmanager = "poolmanager"
	gateway     = "gateway"
)

// Labels of an Instance's pod: which Runtime is booted in it, and whose Functions share it.
const (
	runtimeLabel = "hearth.dev/runtime"
	groupLabel   = "hearth.dev/group"
)

// secretName is the Secret with what `hearth deploy --secret` was given for a Function.
func secretName(function string) string { return "hearth-" + function }

// functionObject is a Function as a user of the cluster would write it.
func functionObject(f *hearthv1.Function) *crd.Function {
	return &crd.Function{ObjectMeta: metav1.ObjectMeta{Name: f.GetName()}, Spec: kube.FunctionResource(f.GetSpec(), secretName(f.GetName()))}
}

// functionMessage is a Function as the daemons' API has it, without the values of its secrets. While it is not ready, its reason is why.
func functionMessage(f *crd.Function) *hearthv1.Function {
	var secrets map[string][]byte
	for _, file := range f.Spec.Secrets {
		if secrets == nil {
			secrets = map[string][]byte{}
		}
		secrets[file.Name] = nil
	}
	s := &f.Status
	out := &hearthv1.Function{Name: f.Name, Spec: kube.FunctionSpec(&f.Spec, secrets), Status: &hearthv1.FunctionStatus{
		Generation: f.Generation, Revision: s.LatestRevision, Ready: s.Ready, Starting: s.Starting, Desired: s.Desired, Reason: s.Reason,
		CreatedAt: timestamppb.New(f.CreationTimestamp.Time),
	}}
	if p := progressOf(f); !p.done {
		out.Status.Reason = p.text
	}
	return out
}

func runtimeObject(r *hearthv1.Runtime) *crd.Runtime {
	return &crd.Runtime{ObjectMeta: metav1.ObjectMeta{Name: r.GetName()}, Spec: kube.RuntimeResource(r)}
}

// runtimeMessage is a Runtime as the daemons' API has it; warm is how many of it should wait on a node.
func runtimeMessage(r *crd.Runtime, warm int32) *hearthv1.Runtime {
	out := kube.RuntimeMessage(r)
	out.Warm, out.Generation, out.Status = warm, r.Generation, &hearthv1.RuntimeStatus{
		Warm: r.Status.Warm, Error: r.Status.Error, Language: r.Status.Language,
	}
	return out
}

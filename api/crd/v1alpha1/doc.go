// Package v1alpha1 has Hearth's custom resources (group hearth.dev) as Go types: Function, Revision, Runtime and WarmPool. The schemas in
// deploy/crds and the deep copies are generated from them, so that every field's comment is what `kubectl explain` says of it, and every
// rule's message is what the API server answers to who breaks it.
//
// The rules mirror pool.Validate, which remains the judge: what a rule cannot say (the sum of all values' sizes) it refuses, and the
// Function's condition Accepted tells.
//
// +kubebuilder:object:generate=true
// +groupName=hearth.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is where these kinds are registered.
var GroupVersion = schema.GroupVersion{Group: "hearth.dev", Version: "v1alpha1"}

// AddToScheme makes these kinds known to a scheme. It never fails.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Function{}, &FunctionList{}, &Revision{}, &RevisionList{}, &Runtime{}, &RuntimeList{}, &WarmPool{}, &WarmPoolList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// Types of conditions. Each has an observedGeneration, and a reason in one word that programs can branch on.
const (
	// ConditionReady sums up the others: what the object promises, it keeps now.
	ConditionReady = "Ready"
	// ConditionAccepted says whether poolmanager has taken over the object as it is now, or what is wrong with it.
	ConditionAccepted = "Accepted"
)

// Labels on what Hearth makes of these objects.
const (
	LabelFunction = "hearth.dev/function"
	LabelRevision = "hearth.dev/revision"
	LabelInstance = "hearth.dev/instance"
	LabelPool     = "hearth.dev/pool"
)
